"""What a scenario is, and what it is asked for.

Law of the file: types only; the scenarios stand in files of their own and in the list of `scenarios.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fleet.real_chaos.outcome import Books, Outcome
from models.bundle import Bundle

BrokerKind = Literal["mosquitto", "embedded"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One play of a scenario.

    Attributes:
        folder: for all that it makes; not there yet.
        bundle: the model of the fleet (`models.thirds`).
        seed: of every choice.
        faults: how many shall hit work in flight.
        until: by `time.monotonic()`: no further fault is begun after it.
        devices: of the fleet.
        tell: called with the number of faults that have counted, as it grows.
    """

    folder: Path
    bundle: Bundle
    seed: int
    faults: int
    broker: BrokerKind
    until: float
    devices: int = 3
    tell: Callable[[int], None] = lambda count: None

    @property
    def is_over(self) -> bool:
        """Whether the time for faults is up."""
        return time.monotonic() >= self.until

    def outcome(
        self, kind: str, books: Books, struck: Mapping[str, int], started: float, *, idle: int = 0
    ) -> Outcome:
        """The row of a play that had no fleet of its own: only what struck, and what the books say.

        Args:
            kind: name of the scenario.
            started: by `time.monotonic()`.
            idle: faults that hit nothing.
        """
        return Outcome(
            kind=kind,
            seed=self.seed,
            broker=self.broker,
            books=books,
            faults=sum(struck.values()),
            idle=idle,
            struck=struck,
            seconds=time.monotonic() - started,
        )


@dataclass(frozen=True, slots=True)
class Scenario:
    """One kind of fault, or one way of mixing them.

    Attributes:
        name: for `--kinds` and the table.
        sentence: what it does, for people.
        play: starts a fleet of its own, breaks it, ends it, and gives its row.
        needs: programs on PATH without which it cannot be played.
        weight: its share of a campaign's faults, against the others'.
    """

    name: str
    sentence: str
    play: Callable[[Task], Outcome]
    needs: tuple[str, ...] = ()
    weight: float = 1.0
