"""The aggregator's metrics after a stormy simulated run: they agree with the books of both sides."""

from __future__ import annotations

from pathlib import Path

from cloud_server.db.releases import HELD, RELEASED, load_releases
from cloud_server.db.rounds import load_rounds, load_updates
from cloud_server.enrolment.ca import CertificateAuthority
from cloud_server.metrics_reading import EventQueue, read_metrics
from fleet.simulate import RUN
from models.bundle import Bundle
from tests.fleet.test_simulation import DEVICES, STORMY, play


def test_metrics_agree_with_the_books(watch_bundle: Bundle, tmp_path: Path) -> None:
    simulation, _ = play(watch_bundle, STORMY, rounds=3)
    base, cloud = simulation.base, simulation.cloud
    CertificateAuthority.create(tmp_path, name="Shoal", now=base.clock.now())
    read_metrics(
        cloud.metrics,
        base,
        cloud,
        ring="stable",
        authority=tmp_path,
        runner=lambda: simulation.runner,
        events=EventQueue(lambda: 0, lambda: 0),
    )
    values = cloud.metrics.registry.values()
    with base.database.read() as connection:
        rounds = load_rounds(connection, RUN)
        folded = [
            len(load_updates(connection, RUN, row.number, kind, "folded"))
            for row in rounds
            for kind in ("train", "evaluate")
        ]
        releases = [row for row in load_releases(connection) if row.run]
    done = sum(row.state == "done" for row in rounds)
    decided = {state: sum(row.state == state for row in releases) for state in (RELEASED, HELD)}
    held = sum(
        value
        for name, value in values.items()
        if name.startswith("shoal_gate_decisions_total") and '"released"' not in name
    )
    by_kind = {kind: f'shoal_updates_total{{kind="{kind}",state="folded"}}' for kind in ("train", "evaluate")}
    assert values['shoal_rounds_total{state="done"}'] == values["shoal_round_seconds_count"] == done == 3
    assert sum(values[name] for name in by_kind.values()) == sum(folded) > 0
    assert values['shoal_gate_decisions_total{decision="released"}'] == decided[RELEASED]
    assert held == decided[HELD]
    assert values["shoal_release_version"] == base.publisher.current_version()
    assert values["shoal_devices_outdated"] == 0
    assert values['shoal_devices{status="approved",presence="online"}'] == DEVICES
    assert values['shoal_updates_open{kind="train"}'] == values['shoal_updates_open{kind="evaluate"}'] == 0
    assert values['shoal_round_step_seconds_count{step="fold"}'] == done
    assert values["shoal_broker_connected"] == 1
    assert values["shoal_database_commit_seconds_count"] == 0  # measured from the reading on
    # Nobody forged anything; the broker may bring what was seen.
    for reason in ("signature", "signer", "addressee", "format", "decryption", "body", "topic"):
        assert values[f'shoal_messages_refused_total{{reason="{reason}"}}'] == 0
    # A receipt for each reply at least, and what the counters of bytes say is what the sender says.
    assert values['shoal_messages_sent_total{type="ak"}'] >= sum(folded)
    sent = sum(value for name, value in values.items() if name.startswith("shoal_messages_sent_bytes_total"))
    assert sent == cloud.sender.sent_bytes_total
    received = sum(
        value for name, value in values.items() if name.startswith("shoal_messages_received_bytes_total")
    )
    assert received == cloud.aggregator.inbox.received_bytes_total
    simulation.close()
