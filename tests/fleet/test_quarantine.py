"""A device that its strikes put into quarantine trains no more, and goes on getting releases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_server.assembly import RunConfig
from cloud_server.db.devices import QUARANTINED
from cloud_server.db.releases import RELEASED, load_releases
from cloud_server.db.rounds import load_orders, load_rounds
from cloud_server.metrics_reading import EventQueue, read_metrics
from cloud_server.release.gate import GatePolicy
from cloud_server.rounds.state import RoundPolicy
from cloud_server.strikes import StrikePolicy
from edge_agent import shell
from edge_agent.ports import Engine
from edge_agent.rounds.jobs import Assignment
from fleet.simulation import Simulation
from models.bundle import Bundle
from tests.fleet.thirds import make_federation
from wire.messages import TrainConfig

NAMES = ("oak", "elm", "ash", "fir")


@pytest.mark.slow
def test_device_in_quarantine_is_asked_no_more_and_still_gets_releases(
    thirds_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A real agent whose training is broken: its updates do not decode."""
    sound = shell.do_train

    def broken(engine: Engine, work: Assignment, should_stop: Callable[[], bool]) -> Any:
        trained = sound(engine, work, should_stop)
        if work.device != "oak" or not isinstance(trained, tuple):
            return trained
        return msgspec.structs.replace(trained[0], payload=b"?"), trained[1]

    monkeypatch.setattr(shell, "do_train", broken)
    config = RunConfig(
        run="quarantine",
        policy=RoundPolicy(quorum=2, rounds=3),
        train=TrainConfig(codec="fp32", epochs=10, learning_rate=0.1),
        gate=GatePolicy(max_operator_drop=1.0),
        strikes=StrikePolicy(limit=1),
    )
    simulation = Simulation(make_federation(*NAMES), thirds_bundle, config, seed=3)
    simulation.run()
    row = simulation.base.registry.show("oak")
    assert (row.status, row.strikes) == (QUARANTINED, 1)
    with simulation.base.database.read() as connection:
        asked = [
            each.number
            for each in load_rounds(connection, "quarantine")
            for order in load_orders(connection, "quarantine", each.number, "train")
            if order.device == "oak"
        ]
        released = {each.version: each.round for each in load_releases(connection) if each.state == RELEASED}
    assert asked == [1]
    newest = max(released)
    assert released[newest] > 1
    for agent in simulation.agents.values():
        model = agent.parts.serving.current
        assert model is not None
        assert model.release_version == newest
    counted = simulation.cloud.metrics
    events = EventQueue(lambda: 0, lambda: 0)
    read_metrics(
        counted,
        simulation.base,
        simulation.cloud,
        ring="stable",
        authority=tmp_path,
        runner=lambda: simulation.runner,
        events=events,
    )
    assert counted.strikes.value(reason="not_decodable") == 1
    assert counted.quarantines.value() == 1
    assert counted.updates_refused.value(reason="not_decodable") == 1
    assert counted.devices.value(status=QUARANTINED, presence="online") == 1
    simulation.close()
