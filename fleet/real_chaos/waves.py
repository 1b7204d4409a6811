"""Faults in waves: some at once, each at a moment of its own while work is in flight; then all end, and it must drain.

Laws of the file: the seed draws what, when and for how long; what the processes do between is the machine's; a fault
that finds no work to hit within its patience is not done. Whatever happens, every fault that began is ended.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleet.real_chaos.outcome import Outcome
from fleet.real_chaos.real_fleet import RealFleet
from fleet.real_chaos.scenario import Task
from wire.errors import RoundError

SPREAD_SECONDS = 1.0
"""Within which the faults of a wave begin."""
PATIENCE_SECONDS = 60.0
"""How long a fault waits for work that it can hit."""
CALM_ROUNDS = 2
"""That must move the head once no fault strikes any more."""
_GLANCE_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that can be done to a fleet and undone.

    Attributes:
        name: what it is, for the histogram.
        target: what it is done to; a wave does one thing at a time to each target.
        begin, end: do and undo it.
        hold_seconds: for how long, at least and at most.
        device: whose work it hits; empty for anybody's.
        hits: how often it has struck, since the fleet began; None for one that strikes by beginning.
    """

    name: str
    target: str
    begin: Callable[[], None]
    end: Callable[[], None]
    hold_seconds: tuple[float, float]
    device: str = ""
    hits: Callable[[], int] | None = None


@dataclass(slots=True)
class _Active:
    fault: Fault
    until: float
    hits_before: int


class Waves:
    """Breaks one fleet.

    Args:
        faults: what is drawn from.
        most: faults of one wave, at most.
    """

    def __init__(self, fleet: RealFleet, faults: Sequence[Fault], *, most: int = 3) -> None:
        self._fleet = fleet
        self._faults = tuple(faults)
        self._most = most
        self._rng = random.Random(f"waves {fleet.task.seed}")
        self.struck: Counter[str] = Counter()
        self.idle = 0
        self.drains: list[float] = []
        self.recoveries: list[float] = []

    def play(self, count: int) -> None:
        """Waves until so many faults have hit work in flight, or until the time is up.

        Raises:
            RoundError: the fleet does not come back, or does not drain.
        """
        idle_waves = 0
        while self.struck.total() < count and not self._fleet.task.is_over and idle_waves < 3:
            before = self.struck.total()
            self._wave(min(self._most, count - before))
            ended = time.monotonic()
            self._fleet.wait_until_up()
            self.drains.append(self._fleet.drain())
            self.recoveries.append(time.monotonic() - ended)
            self._fleet.task.tell(self.struck.total())
            idle_waves = 0 if self.struck.total() > before else idle_waves + 1

    def _wave(self, most: int) -> None:
        began = time.monotonic()
        pending = [
            (began + self._rng.uniform(0.0, SPREAD_SECONDS), fault)
            for fault in self._choose(self._rng.randint(min(2, most), most))
        ]
        active: list[_Active] = []
        try:
            while pending or active:
                now = time.monotonic()
                for each in [one for one in active if one.until <= now]:
                    active.remove(each)
                    self._end(each)
                for moment in [one for one in pending if one[0] <= now]:
                    if self._try(moment, now, active):
                        pending.remove(moment)
                time.sleep(_GLANCE_SECONDS)
        finally:
            for each in active:
                each.fault.end()

    def _try(self, moment: tuple[float, Fault], now: float, active: list[_Active]) -> bool:
        """Begins a fault whose time has come, if it can hit something; False while it waits for that."""
        due, fault = moment
        if not self._fleet.ledger.is_in_flight(fault.device):
            if now - due > PATIENCE_SECONDS:
                self.idle += 1
                return True
            return False
        before = 0 if fault.hits is None else fault.hits()
        fault.begin()
        active.append(_Active(fault, time.monotonic() + self._rng.uniform(*fault.hold_seconds), before))
        return True

    def _end(self, each: _Active) -> None:
        each.fault.end()
        if each.fault.hits is None or each.fault.hits() > each.hits_before:
            self.struck[each.fault.name] += 1
        else:
            self.idle += 1

    def _choose(self, count: int) -> list[Fault]:
        """Distinct targets, and for each of them one of its faults."""
        by_target: dict[str, list[Fault]] = {}
        for fault in self._faults:
            by_target.setdefault(fault.target, []).append(fault)
        targets = self._rng.sample(sorted(by_target), min(count, len(by_target)))
        return [self._rng.choice(by_target[target]) for target in targets]


def play_waves(
    name: str,
    task: Task,
    faults: Callable[[RealFleet], Sequence[Fault]],
    fleet: RealFleet,
    *,
    most: int = 3,
) -> Outcome:
    """Starts a fleet, breaks it in waves, lets it come to rest, and closes its books.

    Args:
        faults: what is drawn from, once the fleet is there.
        most: faults of one wave, at most.
    """
    started = time.monotonic()
    complaints: tuple[str, ...] = ()
    with fleet:
        waves = Waves(fleet, faults(fleet), most=most)
        try:
            waves.play(task.faults)
            fleet.calm(CALM_ROUNDS)
            fleet.rest()
        except RoundError as error:
            complaints = (f"{error} ({error.hint})",)
        books = fleet.ledger.reconcile()
        return Outcome(
            kind=name,
            seed=task.seed,
            broker=task.broker,
            books=books,
            faults=waves.struck.total(),
            idle=waves.idle,
            struck=waves.struck,
            drains=tuple(waves.drains),
            recoveries=tuple(waves.recoveries),
            rounds=fleet.ledger.rounds_done(),
            refusals=sum(agent.errors for agent in fleet.agents.values()),
            seconds=time.monotonic() - started,
            complaints=complaints,
        )
