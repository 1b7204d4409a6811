"""The identity folder: whole or not at all, private, and clear about what is wrong with it."""

from __future__ import annotations

import os
import stat
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from cloud_server.enrolment.ca import CertificateAuthority
from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.identity import Identity, parse_broker_url, parse_https_url
from wire.enrolment import OnlineKey
from wire.errors import ConfigurationError, EnrolmentError, ShoalError, StorageError
from wire.primitives import SigningKey, generate_tls_key, make_csr

KEY = SigningKey.from_bytes(bytes(range(32)))
NOW = 1_800_000_000.0
TLS_KEY = generate_tls_key()


def certificates() -> tuple[bytes, bytes]:
    """Of an authority, and of a device with `TLS_KEY`."""
    with tempfile.TemporaryDirectory() as folder:
        authority = CertificateAuthority.create(Path(folder), name="test CA", now=NOW)
    issued = authority.issue_device(make_csr(TLS_KEY, "device-1").decode(), "device-1", now=NOW)
    return authority.certificate_pem.encode(), issued.pem.encode()


CA, CERTIFICATE = certificates()
IDENTITY = Identity(
    tenant="tenant",
    fleet="fleet",
    device="device-1",
    url_enrol="https://10.0.0.1:8443",
    url_api="https://10.0.0.1:8444",
    tls_name="aggregator",
    mqtt_host="10.0.0.1",
    mqtt_port=8883,
    mqtt_tls=True,
    ca_pem=CA,
    certificate_pem=CERTIFICATE,
    update_key=KEY,
    tuf_root=b'{"signed":{}}',
    ring="canary",
    channel="canary",
    kem=(OnlineKey(id="00" * 8, algorithm="x25519", public="ab" * 32),),
    orders=(OnlineKey(id="11" * 8, public="cd" * 32),),
    max_examples=5000,
)
FILES = ("ca.pem", "certificate.pem", "enrolment.json", "root.json", "tls.key", "update.key")


def save(folder: Path) -> bytes:
    identity_files.save(IDENTITY, folder, tls_key_pem=TLS_KEY)
    return TLS_KEY


def test_saved_identity_is_loaded_again(tmp_path: Path) -> None:
    key = save(tmp_path)
    loaded = identity_files.load(tmp_path)
    assert loaded.update_key.public_bytes == KEY.public_bytes
    assert replace(loaded, update_key=KEY, folder=None) == IDENTITY
    assert loaded.tls_key_path.read_bytes() == key
    assert loaded.certificate_path.read_bytes() == IDENTITY.certificate_pem
    assert loaded.ca_path.read_bytes() == IDENTITY.ca_pem


def test_nobody_else_can_read_the_identity(tmp_path: Path) -> None:
    save(tmp_path)
    folder = tmp_path / "identity"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name
    assert [path.name for path in tmp_path.iterdir()] == ["identity"]


def test_identity_never_prints_its_secrets() -> None:
    text = repr(IDENTITY)
    assert KEY.private_bytes().hex() not in text
    assert str(KEY.private_bytes()) not in text
    assert "CERTIFICATE" not in text


def test_identity_is_not_overwritten(tmp_path: Path) -> None:
    save(tmp_path)
    before = (tmp_path / "identity" / "tls.key").read_bytes()
    with pytest.raises(ConfigurationError, match="already"):
        save(tmp_path)
    assert (tmp_path / "identity" / "tls.key").read_bytes() == before


def test_half_an_identity_of_a_crash_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".identity.new").mkdir()
    (tmp_path / ".identity.new" / "tls.key").write_bytes(b"of an earlier attempt")
    key = save(tmp_path)
    assert identity_files.load(tmp_path).tls_key_path.read_bytes() == key


def test_not_enrolled_says_how_to_enrol(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        identity_files.load(tmp_path)
    assert "not enrolled" in str(caught.value)
    assert "shoal-edge enroll" in caught.value.hint


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [None, b"", bytes(300_000)])
def test_missing_empty_or_huge_file_is_an_error_of_ours(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    save(tmp_path)
    path = tmp_path / "identity" / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(ShoalError):
        identity_files.load(tmp_path)


@pytest.mark.parametrize("name", sorted({*FILES} - {"root.json"}))
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{}", b"[" * 100_000])
def test_damaged_file_is_named_in_an_error_of_ours(tmp_path: Path, name: str, content: bytes) -> None:
    save(tmp_path)
    (tmp_path / "identity" / name).write_bytes(content)
    with pytest.raises(EnrolmentError, match=name) as caught:
        identity_files.load(tmp_path)
    assert caught.value.facts["damaged_file"] == name


@pytest.mark.parametrize("name", FILES)
def test_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    (tmp_path / "identity" / name).unlink()
    os.mkfifo(tmp_path / "identity" / name)
    with pytest.raises(EnrolmentError) as caught:
        identity_files.load(tmp_path)
    assert caught.value.facts["damaged_file"] == name


def test_key_of_another_certificate_is_an_error_that_blames_neither_file(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "identity" / "tls.key").write_bytes(generate_tls_key())
    with pytest.raises(EnrolmentError, match="not the key of") as caught:
        identity_files.load(tmp_path)
    assert "damaged_file" not in caught.value.facts


def test_broken_identity_makes_room_for_a_new_one_and_keeps_its_keys(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "identity" / "certificate.pem").write_bytes(b"garbage")
    save(tmp_path)
    assert identity_files.load(tmp_path).certificate_pem == CERTIFICATE
    (entry,) = (path for path in (tmp_path / "quarantine").iterdir() if path.is_dir())
    assert "certificate.pem is damaged" in entry.with_name(f"{entry.name}.reason").read_text()
    assert (entry / "update.key").read_bytes() == KEY.private_bytes()
    assert stat.S_IMODE((entry / "update.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "quarantine").stat().st_mode) == 0o700


def test_identity_whose_keys_are_only_open_to_others_is_not_replaced(tmp_path: Path) -> None:
    save(tmp_path)
    os.chmod(tmp_path / "identity" / "update.key", 0o644)
    with pytest.raises(ConfigurationError, match="already"):
        save(tmp_path)
    assert (tmp_path / "identity" / "update.key").read_bytes() == KEY.private_bytes()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"tenant": "tenant"', '"tenant": "a/b"'),
        ('"format": 1', '"format": 2'),
        ('"ring": "canary"', '"rong": "canary"'),
        ("mqtts://10.0.0.1:8883", "amqp://10.0.0.1:8883"),
        ("mqtts://10.0.0.1:8883", "mqtts://10.0.0.1"),
        ('"max_examples": 5000', '"max_examples": "5000"'),
        ('"algorithm": "x25519"', '"algorithm": "x25520"'),
    ],
)
def test_enrolment_file_that_was_edited_wrongly_is_refused(tmp_path: Path, old: str, new: str) -> None:
    save(tmp_path)
    path = tmp_path / "identity" / "enrolment.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(EnrolmentError):
        identity_files.load(tmp_path)


@pytest.mark.parametrize("name", ["update.key", "tls.key"])
def test_key_that_others_may_read_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    os.chmod(tmp_path / "identity" / name, 0o644)
    with pytest.raises(ConfigurationError) as caught:
        identity_files.load(tmp_path)
    assert "chmod 600" in caught.value.hint


def test_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        save(tmp_path / "file")


def test_simulated_device_has_no_files() -> None:
    with pytest.raises(ConfigurationError):
        _ = IDENTITY.tls_key_path


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("mqtt://localhost:1883", ("localhost", 1883, False)),
        ("mqtts://broker.example:8883/", ("broker.example", 8883, True)),
        ("mqtt://[::1]:1883", ("::1", 1883, False)),
    ],
)
def test_broker_url_is_taken_apart(url: str, parsed: tuple[str, int, bool]) -> None:
    assert parse_broker_url(url) == parsed


@pytest.mark.parametrize(
    "url",
    [
        "",
        "https://host",
        "http://host:80",
        "https://host:0",
        "https://host:99999",
        "https://host:x",
        "https://user:password@host:443",
        "https://host:443/path",
        "https://host:443?query",
        "https://:443",
        "https://[::1:443",
        "host:443",
    ],
)
def test_url_that_is_not_ours_is_refused(url: str) -> None:
    with pytest.raises(EnrolmentError):
        parse_https_url(url)
    assert parse_https_url("https://host:443") == ("host", 443)


def test_ipv6_broker_survives_saving(tmp_path: Path) -> None:
    identity_files.save(replace(IDENTITY, mqtt_host="::1"), tmp_path, tls_key_pem=TLS_KEY)
    assert identity_files.load(tmp_path).mqtt_host == "::1"
