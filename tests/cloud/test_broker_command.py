"""`shoal-cloud broker`: what it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509

from cloud_server.broker import open_broker
from cloud_server.cli import main
from cloud_server.deployment import Deployment, initialise
from cloud_server.layout import StateFolder
from cloud_server.settings import BrokerSettings, CloudSettings
from tests.cloud.test_cli import Printed, Run, enrol
from wire.transport.broker_access import mosquitto_access


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder that all tests of the file share: the command only reads it."""
    place = tmp_path_factory.mktemp("broker") / "state"
    settings = CloudSettings(tenant="acme", fleet="watches")
    initialise(place, settings).close()
    return place


@pytest.fixture
def made(state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one command on the shared state folder."""
    monkeypatch.setenv("SHOAL_STATE", str(state))

    def run(*words: str) -> Printed:
        capsys.readouterr()
        code = main(words)
        captured = capsys.readouterr()
        return Printed(code, captured.out, captured.err)

    return run


def options_of(file: Path) -> dict[str, str]:
    """Option and value of every line of a configuration."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split(" ", 1) for line in lines)


def test_config_is_whole_and_says_what_it_wrote(made: Run, tmp_path: Path) -> None:
    out = tmp_path / "mosquitto"
    words = ("--out", str(out), "--host", "mq.example.com", "--host", "192.0.2.7", "--port", "18883")
    facts = made("broker", "config", *words, "--json").json
    assert facts["files"] == sorted(path.name for path in out.iterdir())
    assert (facts["port"], facts["names"]) == (18883, ["shoal-cloud", "mq.example.com", "192.0.2.7"])
    assert facts["settings"] == {"kind": "external", "host": "192.0.2.7", "port": 18883, "tls": True}
    certificate = x509.load_pem_x509_certificate((out / "broker.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == facts["names"]
    assert certificate.not_valid_after_utc.timestamp() == facts["certificate_not_after"]
    assert (out / "access").read_text() == mosquitto_access("acme", "watches", ["aggregator"])
    options = options_of(out / "mosquitto.conf")
    assert options["listener"] == "18883 0.0.0.0"
    assert options["tls_version"] == "tlsv1.3"
    for option in ("cafile", "certfile", "keyfile", "crlfile", "acl_file"):
        assert Path(options[option]).parent == out
        assert Path(options[option]).exists()


def test_config_names_the_place_where_it_will_lie(made: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = made(
        "broker", "config", "--out", str(out), "--install-dir", "/etc/shoal broker", "--user", "mq"
    )
    assert printed.code == 0
    options = options_of(out / "mosquitto.conf")
    assert options["keyfile"] == "/etc/shoal broker/broker.key"
    assert options["persistence_location"] == "/etc/shoal broker/"
    assert options["user"] == "mq"
    assert "chown -R mq: /etc/shoal broker" in printed.err
    assert str(out) in printed.err


@pytest.mark.parametrize("persistence", ["interval", "change", "off"])
def test_config_states_when_the_disk_is_written(persistence: str, made: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        made("broker", "config", "--out", str(out), "--persistence", persistence, "--memory", "64").code == 0
    )
    options = options_of(out / "mosquitto.conf")
    assert options["persistence"] == ("false" if persistence == "off" else "true")
    assert ("autosave_on_changes" in options) == (persistence == "change")
    assert options["memory_limit"] == str(64 * 2**20)


def test_config_takes_port_and_name_of_an_external_broker_from_the_settings(
    made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("KIND", "external"), ("HOST", "mq.example.com"), ("PORT", "28883"), ("TLS", "true")):
        monkeypatch.setenv(f"SHOAL_CLOUD_BROKER_{name}", value)
    facts = made("broker", "config", "--out", str(tmp_path / "out"), "--json").json
    assert facts["port"] == 28883
    assert facts["settings"]["host"] == "mq.example.com"


@pytest.mark.parametrize(
    "words",
    [
        ("--host", "0.0.0.0"),
        ("--host", ""),
        ("--host", "two words"),
        ("--host", "bücher.example"),
        ("--listen", "0.0.0.0\nallow_anonymous true"),
        ("--listen", ""),
        ("--user", "root\nallow_anonymous true"),
        ("--user", "two words"),
        ("--install-dir", "/etc/x\nallow_anonymous true"),
        ("--port", "0"),
        ("--port", "65536"),
        ("--persistence", "sometimes"),
        ("--memory", "1"),
    ],
)
def test_config_refuses_words_that_would_break_or_open_the_broker(
    words: tuple[str, ...], made: Run, tmp_path: Path
) -> None:
    printed = made("broker", "config", "--out", str(tmp_path / "out"), *words)
    assert (printed.code, printed.out) == (2, "")
    assert "hint:" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_config_writes_over_nothing_without_being_told(made: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("mine")
    assert "--force" in made("broker", "config", "--out", str(out)).err
    assert [path.name for path in out.iterdir()] == ["notes"]
    assert made("broker", "config", "--out", str(out), "--force").code == 0
    assert (out / "notes").read_text() == "mine"
    assert made("broker", "config", "--out", str(out / "notes")).code == 2


def test_list_of_revoked_certificates_follows_the_register(made: Run, state: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert made("broker", "config", "--out", str(out)).code == 0
    file = out / "revoked.crl"
    assert list(x509.load_pem_x509_crl(file.read_bytes())) == []
    made("device", "add", "cam-1", "--output", str(tmp_path / "token"))
    enrol(state.parent, "cam-1", (tmp_path / "token").read_text().strip())
    assert made("broker", "revoked", "--out", str(file), "--json").json["written"] is False
    assert made("device", "revoke", "cam-1").code == 0
    facts = made("broker", "revoked", "--out", str(file), "--json").json
    assert facts["written"] is True
    assert len(facts["revoked"]) == 1
    listed = [f"{entry.serial_number:x}" for entry in x509.load_pem_x509_crl(file.read_bytes())]
    assert listed == facts["revoked"]


@pytest.mark.parametrize(
    ("host", "tls", "is_said"),
    [
        ("192.0.2.7", False, True),
        ("mq.example.com", False, True),
        ("192.0.2.7", True, False),
        ("127.0.0.1", False, False),
        ("::1", False, False),
        ("localhost", False, False),
    ],
)
def test_external_broker_without_tls_is_warned_of_unless_it_is_here(
    host: str, tls: bool, is_said: bool, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = BrokerSettings(kind="external", host=host, port=1883, tls=tls)
    with (
        Deployment(StateFolder(state), CloudSettings(broker=broker)) as deployment,
        open_broker(deployment) as at,
    ):
        assert at == (host, 1883)
    assert ("broker_without_tls" in caplog.text) == is_said
