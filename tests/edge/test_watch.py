"""The watch over a new release: what it condemns and what it lets pass, and an agent that goes back by itself."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent.agent import Agent
from edge_agent.ports import Floats
from edge_agent.release.slots import Slots
from edge_agent.release.watch import KEPT, PENDING_BYTES, PENDING_WINDOWS, Said, Shadowed, Watch, judge
from edge_agent.settings import EdgeSettings, HealthSettings, ReleaseSettings
from edge_agent.store.storage import open_database
from tests.edge.lab import Lab, windows
from wire.errors import ModelError
from wire.messages import Telemetry

LIMITS = ReleaseSettings()


def pairs(
    count: int,
    *,
    labels: tuple[int, int] = (0, 0),
    scores: tuple[float, float] = (0.95, 0.95),
    seconds: tuple[float, float] = (0.001, 0.001),
) -> list[Shadowed]:
    """Windows that both answered; each pair is (new, before)."""
    new, before = (Said(*each) for each in zip(labels, scores, seconds, strict=True))
    return [Shadowed(new, before)] * count


@pytest.mark.parametrize(
    ("seen", "word"),
    [
        (pairs(40), ""),
        (pairs(15, labels=(1, 0)), ""),
        (pairs(16, labels=(1, 0)), "differs on 100% of 16"),
        (pairs(12, labels=(1, 0)) + pairs(28), ""),
        (pairs(21, labels=(1, 0)) + pairs(19), "differs on 52% of 40"),
        (pairs(17, labels=(1, 0)) + pairs(19), "moved by 47% of 36"),
        (pairs(9, labels=(1, 0)) + pairs(9, labels=(0, 1)) + pairs(20), ""),
        (pairs(40, scores=(0.5, 0.95)), "confidence is 0.45 lower"),
        (pairs(40, scores=(0.6, 0.95)), ""),
        (pairs(40, scores=(0.99, 0.85)), ""),
        (pairs(500, labels=(1, 0), scores=(0.99, 0.4)), ""),
        (pairs(40, seconds=(0.009, 0.002)), "takes 9.0 ms, and took 2.0 before"),
        (pairs(40, seconds=(0.007, 0.002)), ""),
        (pairs(40, seconds=(0.0009, 0.0001)), ""),
        (pairs(19, seconds=(1.0, 0.002)) + pairs(21), ""),
    ],
)
def test_watch_condemns_what_this_device_can_see_and_nothing_else(seen: list[Shadowed], word: str) -> None:
    verdict = judge(seen, LIMITS)
    assert (word in verdict) if word else verdict == ""


@pytest.mark.parametrize(("error", "is_condemned"), [(0.5, True), (0.39, False)])
def test_watch_condemns_an_anomaly_model_that_reconstructs_worse(error: float, is_condemned: bool) -> None:
    seen = [Shadowed(Said(None, error, 0.0), Said(None, 0.1, 0.0))] * 20
    assert ("reconstruction" in judge(seen, LIMITS)) == is_condemned


class Ticking:
    """A clock on which every reading takes a while."""

    def __init__(self, seconds: float) -> None:
        self._step = seconds
        self._now = 0.0

    def now(self) -> float:
        return self.monotonic()

    def monotonic(self) -> float:
        self._now += self._step
        return self._now


def same(window: Floats) -> tuple[int | None, float]:
    return 0, 0.9


def test_watch_keeps_within_its_bounds() -> None:
    watch = Watch(2, same, same, Ticking(0.0))
    for _ in range(1000):
        watch.offer(np.zeros((1, 4), np.float32))
    watch.look(LIMITS)
    assert len(watch.seen) == PENDING_WINDOWS
    large = np.zeros((1, PENDING_BYTES // 4), np.float32)
    for _ in range(5):
        watch.offer(large)
    watch.look(LIMITS)
    assert len(watch.seen) == PENDING_WINDOWS + 1, "one window there always is"
    for _ in range(50):
        for _ in range(PENDING_WINDOWS):
            watch.offer(np.zeros((1, 4), np.float32))
        watch.look(LIMITS)
    assert len(watch.seen) == KEPT


def test_watch_of_a_slow_model_ends_with_its_budget_and_goes_on_at_the_next_look() -> None:
    watch = Watch(2, same, same, Ticking(0.05))
    for _ in range(10):
        watch.offer(np.zeros((1, 4), np.float32))
    watch.look(LIMITS)
    assert 0 < len(watch.seen) < 10
    for _ in range(10):
        watch.look(LIMITS)
    assert len(watch.seen) == 10


def test_window_that_a_caller_changes_afterwards_is_shadowed_as_it_was() -> None:
    asked: list[float] = []

    def note(window: Floats) -> tuple[int | None, float]:
        asked.append(float(window[0, 0]))
        return 0, 0.9

    watch = Watch(2, note, note, Ticking(0.0))
    window = np.ones((1, 4), np.float32)
    watch.offer(window)
    window[:] = 7
    watch.look(LIMITS)
    assert asked == [1.0, 1.0]


def test_model_that_fails_in_the_shadow_is_no_verdict() -> None:
    def fail(window: Floats) -> tuple[int | None, float]:
        raise ModelError("no")

    watch = Watch(2, same, fail, Ticking(0.0))
    for _ in range(30):
        watch.offer(np.zeros((1, 4), np.float32))
    assert watch.look(LIMITS) == ""


# ---- an agent -----------------------------------------------------------------------------------------------


def sure(lab: Lab, turn: int = 0) -> Floats:
    """Parameters of a model that is sure of everything; `turn` renames its classes."""
    params: Floats = (lab.bundle.checkpoint().params * 12).astype(np.float32)
    for slot in lab.bundle.manifest.params:
        if slot.shape[0] == lab.bundle.manifest.task.classes:
            part = slice(slot.offset, slot.offset + int(np.prod(slot.shape)))
            params[part] = np.roll(params[part].reshape(slot.shape), turn, axis=0).ravel()
    return params


def settings(**health: object) -> EdgeSettings:
    return EdgeSettings(health=msgspec.convert(health, HealthSettings))


def ask(lab: Lab, agent: Agent, seconds: int) -> list[int]:
    """Asks four times a second; the releases that answered."""
    x, _ = windows(lab.bundle, 64, seed=1)
    answered = []
    for number in range(4 * seconds):
        answered.append(agent.infer(x[number % 64]).release_version)
        lab.run(0.25)
    return answered


def two_releases(lab: Lab, agent: Agent, turn: int) -> None:
    """Release 2 is sure and confirmed; release 3 is the same with its classes renamed."""
    lab.run(2)
    lab.cloud.release(lab.cloud.candidate(sure(lab)), 2)
    lab.run(80)
    assert agent.state.release_version == 2
    assert not agent.parts.slots.on_probation
    lab.cloud.release(lab.cloud.candidate(sure(lab, turn)), 3)
    lab.run(5)
    assert agent.state.release_version == 3


def test_release_that_answers_otherwise_goes_back_by_itself_and_the_aggregator_hears_of_it(
    lab: Lab, tmp_path: Path
) -> None:
    slots = Slots(tmp_path / "device")
    agent = lab.agent(slots=slots)
    two_releases(lab, agent, turn=1)
    answered = ask(lab, agent, 60)
    assert answered[0] == 3
    assert answered[-1] == 2
    assert answered.count(3) <= 4 * 15, "sixteen windows that release 2 was sure of, and one look"
    assert agent.parts.serving.total.errors == 0
    current = slots.current()
    assert current is not None
    assert current.version == 2
    lab.run(130)
    told = lab.cloud.of(Telemetry)[-1].body
    assert isinstance(told, Telemetry)
    assert told.remedies == {"roll_back": 1}
    assert told.release_version == 2
    assert agent.parts.serving.watch is None


def test_release_that_answers_alike_is_confirmed(lab: Lab) -> None:
    agent = lab.agent()
    two_releases(lab, agent, turn=0)
    assert set(ask(lab, agent, 70)) == {3}
    assert not agent.parts.slots.on_probation
    assert agent.health.remedies_total == {}


def test_first_model_that_was_trained_is_not_held_back_by_one_that_was_not(lab: Lab) -> None:
    """Release 1 has random parameters: it is sure of nothing, so its disagreement says nothing."""
    agent = lab.agent()
    lab.run(2)
    lab.cloud.release(lab.cloud.candidate(sure(lab, turn=1)), 2)
    lab.run(5)
    assert set(ask(lab, agent, 70)) == {2}
    assert not agent.parts.slots.on_probation


def test_dry_run_says_that_it_would_go_back(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    agent = lab.agent(settings=settings(remedies="dry_run"))
    two_releases(lab, agent, turn=1)
    assert set(ask(lab, agent, 70)) == {3}
    assert caplog.text.count("remedy_would_be") == 1


def test_watch_goes_on_after_a_restart_with_the_predecessor_at_hand(lab: Lab, tmp_path: Path) -> None:
    slots, database = Slots(tmp_path / "device"), open_database(tmp_path / "device", clock=lab.time)
    agent = lab.agent(slots=slots, database=database)
    two_releases(lab, agent, turn=1)
    agent.stop()
    lab.agents.remove(agent)
    again = lab.agent(
        slots=Slots(tmp_path / "device"), database=open_database(tmp_path / "device", clock=lab.time)
    )
    fallback = again.parts.serving.fallback
    assert fallback is not None
    assert (again.state.release_version, fallback.release_version) == (3, 2)
    assert ask(lab, again, 40)[-1] == 2
    again.stop()
