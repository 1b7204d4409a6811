"""An agent looks at its own health and mends what it can: the real agent on a machine whose sensors a test sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from edge_agent.agent import Agent
from edge_agent.ports import TrainInputs, TrainOutputs, TrainSession
from edge_agent.settings import EdgeSettings, HealthSettings
from edge_agent.vitals.machine import RealMachine, free_bytes, hottest
from tests.edge.lab import Lab, feed, windows
from wire.messages import Telemetry, TrainConfig, Update

MIB = 2**20


@dataclass
class Sensors:
    """A machine with everything at hand: what its sensors say, and what was asked of it."""

    free: int = 1000 * MIB
    heat: float = 50.0
    valid: tuple[float, float] | None = None
    rejoined: list[str] = field(default_factory=list)
    cleared: int = 0

    def free_bytes(self) -> int | None:
        return self.free

    def celsius(self) -> float | None:
        return self.heat

    def certificate(self) -> tuple[float, float] | None:
        return self.valid

    def rejoin(self, reason: str) -> None:
        self.rejoined.append(reason)

    def clear_leavings(self) -> None:
        self.cleared += 1


def settings(**health: object) -> EdgeSettings:
    return EdgeSettings(health=msgspec.convert({"remedy_seconds": 120.0, **health}, HealthSettings))


def levels(agent: Agent) -> dict[str, str]:
    return {finding.name: finding.level for finding in agent.health.findings if finding.level != "ok"}


def test_disk_that_runs_full_is_trimmed_less_and_less_often(lab: Lab) -> None:
    sensors = Sensors(free=20 * MIB)
    agent = lab.agent(machine=sensors, settings=settings())
    lab.run(61)
    assert levels(agent) == {"disk": "warn"}
    assert sensors.cleared == 1
    lab.run(600)
    assert agent.health.remedies_total == {"trim": 3}, "at 60, 180 and 420 seconds"
    sensors.free = 1000 * MIB
    lab.run(61)
    assert levels(agent) == {}


def test_dry_run_says_what_it_would_do_and_does_nothing(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    sensors = Sensors(free=20 * MIB, heat=99.0)
    agent = lab.agent(machine=sensors, settings=settings(remedies="dry_run"))
    lab.run(300)
    assert levels(agent) == {"disk": "warn", "heat": "fail"}
    assert (sensors.cleared, agent.health.remedies_total, agent.parts.training_paused) == (0, {}, "")
    assert caplog.text.count("remedy_would_be") == 2


def test_remedies_that_are_off_are_not_even_spoken_of(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    agent = lab.agent(machine=Sensors(heat=99.0), settings=settings(remedies="off"))
    lab.run(61)
    assert levels(agent) == {"heat": "fail"}
    assert "remedy" not in caplog.text


def test_hot_device_declines_to_train_and_goes_on_when_it_has_cooled(lab: Lab) -> None:
    sensors = Sensors(heat=90.0)
    agent = lab.agent(machine=sensors, settings=settings())
    feed(agent, lab.bundle)
    lab.run(61)
    lab.cloud.invite(lab.bundle.checkpoint(), seconds=3600.0)
    lab.cloud.broadcast()
    lab.cloud.order("dev-1")
    lab.run(3)
    (declined,) = lab.joins()
    assert not declined.accepted
    assert declined.reason == "training is paused on this device: 90 °C"
    assert agent.infer(windows(lab.bundle, 1)[0][0]).release_version == 1, "answers go on"
    sensors.heat = 60.0
    lab.run(300)
    assert agent.parts.training_paused == ""
    lab.cloud.order("dev-1")
    lab.run(30)
    assert lab.cloud.of(Update)
    assert agent.health.remedies_total == {"pause_training": 1}


def test_updates_without_receipts_make_the_device_join_the_broker_anew(lab: Lab) -> None:
    sensors = Sensors()
    agent = lab.agent(machine=sensors, settings=settings())
    feed(agent, lab.bundle)
    lab.run(2)
    lab.cloud.invite(lab.bundle.checkpoint(), seconds=3600.0)
    lab.cloud.broadcast()
    lab.cloud.order("dev-1")
    lab.run(900)
    assert len(lab.cloud.of(Update)) >= 5, "nobody answered"
    assert sensors.rejoined
    assert "sends without a receipt" in sensors.rejoined[0]
    lab.cloud.receipt("dev-1", lab.cloud.of(Update)[0])
    lab.run(61)
    assert levels(agent) == {}


def test_certificate_that_was_not_renewed_is_asked_for_at_once(lab: Lab) -> None:
    sensors = Sensors()
    agent = lab.agent(machine=sensors, settings=settings())
    lab.run(30)
    checks = agent.parts.tally.jobs["update", "done"]
    now = lab.time.now()
    sensors.valid = (now - 29 * 86_400, now + 86_400)
    lab.run(62)
    assert levels(agent) == {"certificate": "warn"}
    assert agent.health.remedies_total == {"renew": 1}
    assert agent.parts.tally.jobs["update", "done"] == checks + 1


def test_database_that_cannot_be_read_does_not_stop_the_looks(lab: Lab) -> None:
    agent = lab.agent(machine=Sensors(heat=99.0), settings=settings())
    agent.parts.database.close()
    agent.health.look()
    assert agent.health.findings == ()


def test_aggregator_is_told_with_the_next_heartbeat(lab: Lab) -> None:
    lab.agent(machine=Sensors(heat=99.0, free=20 * MIB), settings=settings())
    lab.run(200)
    told = lab.cloud.of(Telemetry)[-1].body
    assert isinstance(told, Telemetry)
    assert told.unwell == ("heat",)
    assert told.remedies == {"pause_training": 1, "trim": 2}


def test_status_file_tells_findings_and_remedies(lab: Lab, tmp_path: Path) -> None:
    agent = lab.agent(machine=Sensors(heat=99.0), settings=settings(), status_file=tmp_path / "status.json")
    lab.run(61)
    agent.stop()
    shown = json.loads((tmp_path / "status.json").read_text())
    assert shown["health"]["findings"]["heat"] == "fail"
    assert shown["health"]["remedies"] == {"pause_training": 1}
    assert shown["metrics"]['shoal_edge_health{check="heat"}'] == 2
    assert shown["metrics"]['shoal_edge_remedies_total{remedy="pause_training"}'] == 1


# ---- training that runs -------------------------------------------------------------------------------------


class WarmingSession:
    """A real train step that makes the machine hot while it runs for the first time."""

    def __init__(self, session: TrainSession, warm: Callable[[], None]) -> None:
        self._session = session
        self._warm = warm
        self.runs = 0

    @property
    def takes_noise(self) -> bool:
        return self._session.takes_noise

    def run(self, inputs: TrainInputs) -> TrainOutputs:
        self.runs += 1
        self._warm()
        return self._session.run(inputs)


def test_training_that_runs_is_stopped_by_heat_and_its_order_declined(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensors = Sensors()
    agent = lab.agent(machine=sensors, settings=settings())
    feed(agent, lab.bundle)
    lab.run(2)
    load, sessions = lab.runtime.load_train, list[WarmingSession]()

    def warm() -> None:
        sensors.heat = 95.0
        agent.health.look()

    def load_train(model: bytes) -> TrainSession:
        sessions.append(WarmingSession(load(model), warm))
        return sessions[-1]

    monkeypatch.setattr(lab.runtime, "load_train", load_train)
    lab.cloud.invite(lab.bundle.checkpoint(), seconds=3600.0, config=TrainConfig(epochs=20, batch_size=4))
    lab.cloud.broadcast()
    lab.cloud.order("dev-1")
    lab.run(10)
    assert [session.runs for session in sessions] == [1], "160 steps are three runs"
    last = lab.joins()[-1]
    assert (last.accepted, last.reason) == (False, "ModelError: training was stopped")
    assert lab.cloud.of(Update) == []
    assert (agent.state.phase, agent.state.tasks) == ("idle", ())


# ---- a real machine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        (["45000", "61500"], 61.5),
        (["45000", "not a number"], 45.0),
        (["0", "-273000", "999999999"], None),
        ([], None),
    ],
)
def test_hottest_plausible_sensor_counts(tmp_path: Path, readings: list[str], expected: float | None) -> None:
    for number, reading in enumerate(readings):
        zone = tmp_path / f"thermal_zone{number}"
        zone.mkdir()
        (zone / "temp").write_text(f"{reading}\n")
    assert hottest(tmp_path) == expected
    assert hottest(tmp_path / "missing") is None


def test_disk_that_is_not_there_is_not_known(tmp_path: Path) -> None:
    assert (free_bytes(tmp_path) or 0) > 0
    assert free_bytes(tmp_path / "missing") is None


def test_machine_of_an_identity_without_files_knows_no_certificate(lab: Lab, tmp_path: Path) -> None:
    machine = RealMachine(tmp_path, lab.identity("dev-9"), rejoin=lambda _: None, clear=lambda: None)
    assert machine.certificate() is None
