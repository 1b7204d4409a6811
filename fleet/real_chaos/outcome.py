"""What came of one fleet that was broken on purpose: a row of the table.

Laws of the file: data only; a fault counts when it hit work in flight, and only then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Books:
    """What the ledger found when nothing moved any more.

    Attributes:
        updates: updates and evaluations that devices had committed to their outboxes.
        lost: of those, how many are nowhere, or were given up for a reason that is not so.
        doubled: how many count twice: two sound answers to one order, or a head that is not the sum of its folds.
        altered: rows of the aggregator with a content that no device made.
        owed: still open in an outbox.
        places: how many are in each place.
        complaints: each finding in words.
    """

    updates: int = 0
    lost: int = 0
    doubled: int = 0
    altered: int = 0
    owed: int = 0
    places: Mapping[str, int] = field(default_factory=Counter)
    complaints: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One row.

    Attributes:
        kind: name of the scenario.
        broker: `mosquitto` or `embedded`.
        faults: faults that hit work in flight.
        idle: faults that were done and hit nothing, which are not counted.
        struck: counted faults by what they were (`agent kill`, `link resets`).
        drains: for each wave, seconds until what was owed had ended, from when everybody answered again.
        recoveries: the same, from the end of the wave's last fault: with the starts of all that was killed.
        rounds: rounds that moved the head.
        refusals: inference requests that were answered with an error.
        complaints: what is wrong beside the books: a process that ended by itself, a queue that did not drain.
    """

    kind: str
    seed: int
    broker: str
    books: Books
    faults: int
    idle: int = 0
    struck: Mapping[str, int] = field(default_factory=Counter)
    drains: tuple[float, ...] = ()
    recoveries: tuple[float, ...] = ()
    rounds: int = 0
    refusals: int = 0
    seconds: float = 0.0
    complaints: tuple[str, ...] = ()

    @property
    def violations(self) -> tuple[str, ...]:
        """All that must not be."""
        return (*self.books.complaints, *self.complaints)

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        books = self.books
        return {
            "kind": self.kind,
            "seed": self.seed,
            "broker": self.broker,
            "faults": self.faults,
            "idle": self.idle,
            "struck": dict(sorted(self.struck.items())),
            "updates": books.updates,
            "lost": books.lost,
            "doubled": books.doubled,
            "altered": books.altered,
            "owed": books.owed,
            "places": dict(sorted(books.places.items())),
            "drains": [round(seconds, 3) for seconds in self.drains],
            "recoveries": [round(seconds, 3) for seconds in self.recoveries],
            "rounds": self.rounds,
            "refusals": self.refusals,
            "seconds": round(self.seconds, 1),
            "violations": list(self.violations),
        }
