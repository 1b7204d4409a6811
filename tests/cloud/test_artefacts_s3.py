"""What is wrong with an S3 bucket is said when it is opened: one error, one hint, nothing half-written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloud_server.artefacts import Artefacts
from cloud_server.cli import main
from tests.cloud.s3_server import BUCKET, S3Server
from wire.errors import ConfigurationError, StorageError

pytest.importorskip("moto", reason="needs moto: pip install 'shoal[dev]'")
URL = f"s3://{BUCKET}/fleet-a"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("url", "change", "code", "words"),
    [
        ("s3://other/fleet-a", {}, 2, "there is no bucket for the artefacts at s3://other/fleet-a"),
        (URL, {"key_id": "AKIASOMEBODY"}, 2, "InvalidAccessKeyId"),
        (URL, {"secret": "wrong"}, 2, "SignatureDoesNotMatch"),
        (
            URL,
            {"endpoint": "http://127.0.0.1:9"},
            8,
            "does not answer at s3://artefacts/fleet-a: Connection refused",
        ),
        ("gopher://artefacts", {}, 2, "cannot be used"),
    ],
)
def test_init_on_a_store_that_cannot_be_used_says_what_and_leaves_nothing(
    server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    url: str,
    change: dict[str, str],
    code: int,
    words: str,
) -> None:
    replace(server.credentials, **change).put_into(monkeypatch)
    settings = tmp_path / "settings.toml"
    settings.write_text(f'[storage]\nartefacts = "{url}"\n')
    assert main(["init", "--state", str(tmp_path / "state"), "--settings", str(settings)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()
    assert error.startswith("error: ")
    assert words in error
    assert hint.startswith("hint: ")
    assert sorted(tmp_path.iterdir()) == [settings]


def test_endpoint_without_tls_is_refused_unless_that_is_wanted(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.credentials.put_into(monkeypatch)
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(ConfigurationError, match="not encrypted") as caught:
        Artefacts.open(URL)
    assert "AWS_ALLOW_HTTP" in caught.value.hint


def test_store_that_goes_away_is_one_line_and_comes_back(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.credentials.put_into(monkeypatch)
    artefacts = Artefacts.open(URL)
    digest = artefacts.put_blob(b"kept")
    server.stop()
    try:
        with pytest.raises(StorageError, match="Connection refused") as caught:
            artefacts.get_blob(digest)
    finally:
        server.start()
    assert "\n" not in str(caught.value)
    assert caught.value.facts["is_missing"] is False
    assert artefacts.get_blob(digest) == b"kept"


def test_prefixes_of_one_bucket_are_apart(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.credentials.put_into(monkeypatch)
    one, other = Artefacts.open(f"s3://{BUCKET}/one"), Artefacts.open(f"s3://{BUCKET}/other")
    one.write("tuf/x", b"1")
    assert (one.read("tuf/x"), other.read("tuf/x")) == (b"1", None)
    assert "one/tuf/x" in server.stored()
