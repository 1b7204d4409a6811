"""The aggregator's metrics: closed reasons, books that are read seldom, and nothing that grows with the fleet."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cloud_server.db.engine import open_database
from cloud_server.db.overview import load_totals
from cloud_server.enrolment.ca import CertificateAuthority, certificate_ends, ensure_server_files
from cloud_server.metrics import REFUSED, CloudMetrics, refusal_reason
from cloud_server.metrics_reading import Throttled
from process.metrics import OTHER
from tests.cloud.deployment import NOW, SteppedClock
from wire.errors import ConfigurationError
from wire.messages import InferenceReport
from wire.transport import Packet

WIRE = Path(__file__).resolve().parent.parent.parent / "wire"


def test_every_reason_of_the_envelope_has_a_label() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in WIRE.glob("*.py"))
    reasons = set(re.findall(r'(?:failed\(|reason=)"([a-z_]+)"', sources))
    assert len(reasons) > 15
    assert reasons <= REFUSED.keys()


@pytest.mark.parametrize(
    ("logged", "reason"),
    [
        ("tm: signature", "signature"),
        ("st: signer", "signer"),
        ("up: ChunkError", "chunk"),
        ("jn: MessageError", "body"),
        ("tm: seen", "replayed"),
        ("topic", "topic"),
        ("no upward topic es", "topic"),
        ("st: PeerError", "revoked"),
        ("tm: something new", OTHER),
    ],
)
def test_reasons_of_the_log_become_few(logged: str, reason: str) -> None:
    assert refusal_reason(logged) == reason


def test_metrics_do_not_grow_with_what_peers_send() -> None:
    metrics = CloudMetrics()
    before = len(metrics.registry.values())
    for number in range(50):
        metrics.note_received(Packet(f"fl/1/t/f/x{number}/device-{number}", b"abc"))
        metrics.note_received(Packet("nonsense", b"abc"))
    values = metrics.registry.values()
    assert len(values) - before == 2  # one `other` for messages, one for bytes
    assert values['shoal_messages_received_bytes_total{type="other"}'] == 300
    assert not any("device-" in series for series in values)


def test_reports_of_devices_are_added_up() -> None:
    metrics = CloudMetrics()
    for errors in (0, 3):
        metrics.note_report(
            InferenceReport(
                release_version=1,
                requests=10,
                errors=errors,
                latency_p50_seconds=0.001,
                latency_p99_seconds=0.02,
                confidence_mean=0.5,
                label_counts=(),
                feedback_correct=2,
                feedback_total=5,
            )
        )
    values = metrics.registry.values()
    assert values['shoal_fleet_inferences_total{outcome="answered"}'] == 17
    assert values['shoal_fleet_inferences_total{outcome="failed"}'] == 3
    assert values['shoal_fleet_feedback_total{outcome="right"}'] == 4
    assert values['shoal_fleet_feedback_total{outcome="wrong"}'] == 6
    assert values["shoal_fleet_latency_p99_seconds_count"] == 2


def test_every_metric_has_a_meaning_and_a_use() -> None:
    for metric in CloudMetrics().registry.metrics():
        assert metric.meaning.endswith("."), metric.name
        assert metric.use.endswith("."), metric.name


# ---- reading -----------------------------------------------------------------------------------------------


def test_books_are_read_again_only_after_a_while() -> None:
    clock, readings = SteppedClock(), []

    def read() -> int:
        readings.append(clock.now())
        clock.seconds += 2.0  # what a reading takes
        return len(readings)

    throttled = Throttled(read, clock, least_seconds=5.0)
    assert [throttled(), throttled()] == [1, 1]
    clock.seconds += 39.0
    assert throttled() == 1
    clock.seconds += 1.0
    assert throttled() == 2


def test_totals_of_an_empty_database_are_zero() -> None:
    database = open_database("sqlite://")
    database.migrate()
    with database.read() as connection:
        totals = load_totals(connection, ring="stable", bounds=(1.0, 2.0))
    assert (totals.rounds, totals.round_buckets, totals.round_seconds) == ({}, [0, 0, 0], 0.0)
    assert (totals.updates, totals.held, totals.released, totals.release_version) == ({}, {}, 0, 0)
    database.close()


def test_commits_are_measured_and_what_is_rolled_back_is_not() -> None:
    database = open_database("sqlite://")
    database.migrate()
    seen: list[float] = []
    database.on_commit = seen.append
    database.claim_writer()
    assert len(seen) == 1
    assert seen[0] >= 0
    with pytest.raises(ZeroDivisionError), database.transaction():
        raise ZeroDivisionError
    assert len(seen) == 1
    database.close()


def test_certificates_tell_when_they_end(tmp_path: Path) -> None:
    authority = CertificateAuthority.create(tmp_path, name="Shoal", now=NOW)
    ensure_server_files(authority, tmp_path, "server", ["localhost"], now=NOW)
    ends = certificate_ends(tmp_path)
    assert ends.keys() == {"ca", "server"}
    assert ends["ca"] > ends["server"] > NOW
    (tmp_path / "broken.pem").write_text("no certificate")
    with pytest.raises(ConfigurationError, match="broken"):
        certificate_ends(tmp_path)
