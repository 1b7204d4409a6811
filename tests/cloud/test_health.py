"""The aggregator looks at its own health: remedies are in the books, rounds wait for room, probes say one word."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cloud_server.broker import open_broker
from cloud_server.cli import main
from cloud_server.db.audit import load_audit
from cloud_server.deployment import Deployment, initialise
from cloud_server.fleet_health import MOST_AT_ONCE, FleetHealth
from cloud_server.health import CloudHealth, gather
from cloud_server.service import Running, run
from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    HealthSettings,
    ListenSettings,
    MetricsSettings,
)
from tests.cloud.deployment import SteppedClock
from tests.fleet.waiting import wait_for
from wire.messages import Telemetry
from wire.primitives import write_private

DAY = 86_400.0
SETTINGS = CloudSettings(
    listen=ListenSettings(public_port=0, device_port=0),
    broker=BrokerSettings(kind="embedded", port=0),
    metrics=MetricsSettings(listen="127.0.0.1:0"),
)


class Patient:
    """A deployment on a clock that a test moves, whose live facts a test sets and whose remedies it counts."""

    def __init__(self, deployment: Deployment, clock: SteppedClock) -> None:
        self.deployment = deployment
        self.clock = clock
        self.changes: dict[str, object] = {}
        self.given: list[tuple[str, str]] = []
        names = ("trim", "renew", "reconnect", "pause_training")
        self.health = CloudHealth(
            deployment,
            live=lambda facts: replace(facts, **{"free_bytes": 2**40, **self.changes}),  # type: ignore[arg-type]
            remedies={name: self._remedy(name) for name in names},
        )

    def _remedy(self, name: str):  # type: ignore[no-untyped-def]
        return lambda reason: self.given.append((name, reason))

    def look(self, after: float = 60.0, **changes: object) -> list[str]:
        """Looks some seconds later; returns the remedies that were carried out."""
        self.changes = changes
        self.clock.seconds += after
        before = len(self.given)
        self.health.tick()
        return [name for name, _ in self.given[before:]]

    def books(self) -> list[dict[str, str]]:
        with self.deployment.database.read() as connection:
            return [dict(entry.facts) for entry in load_audit(connection, kind="health.remedy")]


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Patient]:
    clock = SteppedClock(time.time())
    with initialise(tmp_path / "state", SETTINGS, clock=clock) as deployment:
        yield Patient(deployment, clock)


def test_remedy_is_in_the_books_and_rationed(patient: Patient) -> None:
    full = {"free_bytes": 300 * 2**20}
    assert patient.look(**full) == ["trim"]
    assert patient.look(**full) == []
    assert patient.look(after=600.0, **full) == ["trim"]
    assert patient.books() == [{"remedy": "trim", "check": "disk", "reason": "300 MiB free"}] * 2
    assert patient.health.levels()["disk"] == 1


def test_full_disk_holds_rounds_until_there_is_room_and_both_are_in_the_books(patient: Patient) -> None:
    assert patient.look(free_bytes=2**20) == ["pause_training", "trim"]
    assert patient.look(free_bytes=2**20) == []
    assert patient.look(free_bytes=2**40) == [], "it was held a moment ago"
    assert patient.look(after=600.0) == ["pause_training"]
    assert patient.given[-1] == ("pause_training", "")
    assert [entry["remedy"] for entry in patient.books()] == ["pause_training", "trim", "resume_training"]


def test_remedy_of_a_database_that_refuses_is_in_the_books_later(
    patient: Patient, caplog: pytest.LogCaptureFixture
) -> None:
    patient.deployment.fence = patient.deployment.database.claim_writer()
    patient.deployment.database.claim_writer()
    assert patient.look(free_bytes=300 * 2**20) == ["trim"]
    assert "remedy_not_in_the_books" in caplog.text
    assert patient.health.levels()["database"] == 2
    assert not patient.health.is_database_well
    assert patient.books() == []
    patient.deployment.fence = patient.deployment.database.claim_writer()
    patient.look()
    assert [entry["remedy"] for entry in patient.books()] == ["trim"]
    assert patient.health.is_database_well


@pytest.mark.parametrize(("mode", "spoken"), [("dry_run", 1), ("off", 0)])
def test_remedies_that_are_not_on_do_nothing(
    patient: Patient, caplog: pytest.LogCaptureFixture, mode: str, spoken: int
) -> None:
    health = msgspec.convert({"remedies": mode}, HealthSettings)
    patient.health._limits = health
    assert patient.look(free_bytes=2**20) == []
    assert patient.look(free_bytes=2**20) == []
    assert patient.books() == []
    assert caplog.text.count("remedy_would_be") == 2 * spoken


def test_facts_tell_the_ends_of_certificates_and_a_clock_that_went_back(patient: Patient) -> None:
    facts = gather(patient.deployment)
    assert facts.renewable == frozenset()
    assert facts.certificates["ca"] > 3000 * DAY
    assert set(facts.signatures) >= {"root", "timestamp"}
    assert facts.behind_seconds == 0
    patient.deployment.server_files()
    patient.clock.seconds += 800 * DAY
    assert gather(patient.deployment).renewable == frozenset(["server"])
    patient.clock.seconds -= 900 * DAY
    assert gather(patient.deployment).behind_seconds > 90 * DAY


def test_check_prints_findings_with_hints_and_says_so_in_its_exit_code(
    patient: Patient, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(patient.deployment.folder.root)
    assert main(["check", "--state", state]) == 0
    out = capsys.readouterr().out
    assert "ok    database     answers" in out
    assert "warn  model        no model is imported\n" in out
    assert "hint: shoal-cloud model import FOLDER" in out
    assert f"hint: start it: shoal-cloud run --state {state}" in out
    patient.deployment.database.close()
    patient.deployment.folder.database.write_bytes(b"")
    assert main(["check", "--state", state, "--json"]) == 1
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["database"]["level"] == "fail"
    assert "missing or empty" in found["database"]["detail"]


def test_check_of_a_damaged_authority_and_repository_names_what_cannot_be_read(
    patient: Patient, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(patient.deployment.folder.root)
    (timestamp,) = patient.deployment.folder.artefacts.rglob("timestamp.json")
    kept = timestamp.read_bytes()
    timestamp.write_bytes(b"{")
    assert main(["check", "--state", state]) == 1
    assert "fail  certificate" in capsys.readouterr().out
    timestamp.write_bytes(kept)
    write_private(patient.deployment.folder.authority / "extra.pem", b"nothing")
    assert main(["check", "--state", state]) == 1
    assert "extra.pem is no certificate" in capsys.readouterr().out


# ---- a running service --------------------------------------------------------------------------------------


def test_service_says_that_it_is_ready_once_the_broker_answers_and_renews_what_it_shows(
    tmp_path: Path,
) -> None:
    """The server certificate is in its last tenth: the running service shows another one before a minute is over."""
    clock = SteppedClock(time.time())
    settings = msgspec.structs.replace(SETTINGS, health=HealthSettings(check_seconds=1.0))
    with initialise(tmp_path / "state", settings, clock=clock) as made:
        clock.seconds -= 800 * DAY
        old = made.server_files()[0].read_bytes()
    stop, running = threading.Event(), list[Running]()
    with ExitStack() as stack:
        opened = stack.enter_context(Deployment.open(tmp_path / "state"))
        certificate = opened.folder.authority / "server.pem"
        certificate.write_bytes(old)
        serving = threading.Thread(target=lambda: run(opened, stop=stop, on_ready=running.append))
        serving.start()
        stack.callback(serving.join)
        stack.callback(stop.set)
        wait_for(lambda: bool(running), "the service")
        base = f"http://127.0.0.1:{running[0].metrics_port}"
        wait_for(lambda: probe(f"{base}/readyz") == (200, {"status": "ready"}), "the broker")
        assert probe(f"{base}/healthz") == (200, {"status": "ok"})
        wait_for(lambda: certificate.read_bytes() != old, "another certificate")
    assert probe(f"{base}/readyz") is None


@pytest.mark.skipif(shutil.which("mosquitto") is None, reason="mosquitto is not installed here")
def test_broker_shows_its_new_certificate_without_a_restart_of_the_service(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, broker=BrokerSettings(kind="mosquitto", port=0, tls=True))
    with initialise(tmp_path / "state", settings) as made, open_broker(made) as (host, port):
        before = shown(made, host, port)
        certificate, _ = made.server_files("broker")
        certificate.unlink()
        made.server_files("broker")
        wait_for(lambda: shown(made, host, port) not in (b"", before), "another certificate")


def shown(deployment: Deployment, host: str, port: int) -> bytes:
    """The certificate (DER) that a server shows; empty while nobody listens."""
    context = ssl.create_default_context(cadata=deployment.authorities.bundle_pem)
    context.check_hostname = False
    try:
        with socket.create_connection((host, port), 10) as plain, context.wrap_socket(plain) as secured:
            return secured.getpeercert(binary_form=True) or b""
    except OSError:
        return b""


def probe(address: str) -> tuple[int, object] | None:
    try:
        with urllib.request.urlopen(address, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
    except urllib.error.URLError:
        return None


# ---- what devices say ---------------------------------------------------------------------------------------


def heartbeat(unwell: tuple[str, ...] = (), **remedies: int) -> Telemetry:
    return msgspec.convert(
        {
            "uptime_seconds": 1.0,
            "release_version": 1,
            "requests_total": 0,
            "errors_total": 0,
            "samples": 0,
            "labelled_samples": 0,
            "outbox": 0,
            "unwell": unwell,
            "remedies": remedies,
        },
        Telemetry,
    )


def test_health_of_devices_is_counted_and_logged_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fleet = FleetHealth()
    for now in (0.0, 60.0, 120.0):
        fleet.note("a", heartbeat(("heat",), trim=2), now)
    fleet.note("b", heartbeat(("heat", "disk")), 0.0)
    assert fleet.unwell() == {"heat": 2, "disk": 1}
    assert fleet.remedies() == {"trim": 2}
    assert caplog.text.count("device_health") == 2
    fleet.note("a", heartbeat((), trim=1), 180.0)
    assert fleet.remedies() == {"trim": 3}, "the device started anew"
    assert fleet.unwell() == {"heat": 1, "disk": 1}
    assert caplog.text.count("device_health") == 3


def test_device_that_lies_without_end_fills_neither_log_nor_counts(caplog: pytest.LogCaptureFixture) -> None:
    fleet = FleetHealth()
    for number in range(200):
        unwell = ("heat",) if number % 2 else ("disk",)
        fleet.note("a", heartbeat(unwell, trim=2**50 * (number % 2)), number * 0.1)
    assert caplog.text.count("device_health") == 1
    assert fleet.remedies()["trim"] <= 100 * MOST_AT_ONCE
