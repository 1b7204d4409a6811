"""What the round machine knows: policy, phase, and the cohort whose replies are awaited. Pure, frozen data.

Source: docs/architecture.md (The aggregator).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from wire.errors import ConfigurationError

NEVER = math.inf
SecurePolicy = Literal["plain", "pairwise", "two_server"]
RoundMode = Literal["sync", "buffered"]


class Phase(StrEnum):
    """Where a run stands. The words of `rounds.state` in the database are those between OPENING and FINISHED.

    KEYS, SHARES and UNMASKING are phases of rounds that devices mask in pairs, ASKING of those that a helper unmasks.
    """

    IDLE = "idle"
    OPENING = "opening"
    KEYS = "keys"
    SHARES = "shares"
    TRAINING = "training"
    UNMASKING = "unmasking"
    ASKING = "asking"
    FOLDING = "folding"
    EVALUATING = "evaluating"
    DECIDING = "deciding"
    FINISHED = "finished"


ANSWERS_PER_SECOND = 100.0
"""What a slow aggregator takes in a round."""
MASK_STEPS = frozenset({Phase.KEYS, Phase.SHARES, Phase.UNMASKING})
"""Phases in which a masked round gathers what is no update."""
COLLECTING = MASK_STEPS | {Phase.TRAINING, Phase.EVALUATING}
"""Phases in which a cohort's answers are awaited."""


class Standing(StrEnum):
    """How one member of a cohort stands."""

    WAITING = "waiting"
    ACCEPTED = "accepted"
    ANSWERED = "answered"
    REFUSED = "refused"
    DECLINED = "declined"
    LOST = "lost"


OUTSTANDING = frozenset({Standing.WAITING, Standing.ACCEPTED})
_FINAL = frozenset({Standing.ANSWERED, Standing.REFUSED})


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPolicy:
    """When rounds open, close and fail.

    Attributes:
        quorum: least number of present devices to open a round, and of stored updates to fold it.
        goal: stored updates that close a collection at once; 0 for all of the cohort.
        round_seconds, evaluate_seconds: longest wait for updates, and for evaluations.
        resend_seconds: an order that nobody accepted or answered is sent again after this long; in a large cohort after
            `resend_after`.
        grace_seconds: how long a collection short of its quorum waits for members that vanished to come back, beyond
            the time that the fleet is asked to take for its return.
        pause_seconds: rest between a round and the next.
        backoff_seconds, backoff_max_seconds: rest after a failed round; doubles with each failure in a row.
        rounds: a run ends when this many rounds moved the head; 0 for never.
        evaluate_every: evaluate and decide on a release after every this many moved heads, and after the last; 0 for
            never.
        folds_always: a collection that is over is folded, however few answered; under differential privacy a round
            that fails for lack of replies would tell how many there were.
        secure: who sees single updates: the cloud (plain), or nobody, by masks that devices agree on (pairwise) or that
            a helper takes away (two_server).
        mask_seconds: longest wait in each of the phases that only masked rounds have.
        mode: whether a round folds updates of its own base only (sync), or the first `goal` updates that come, whatever
            heads they were trained on (buffered).
        max_staleness: buffered: an update counts until so many heads came after the one that it was trained on.
        staleness_exponent: buffered: of the step of an update that is s heads old, (1 + s) to minus this counts.

    Raises:
        ConfigurationError: (operator) a value out of bounds; names it.
    """

    quorum: int = 2
    goal: int = 0
    round_seconds: float = 600.0
    evaluate_seconds: float = 120.0
    resend_seconds: float = 30.0
    grace_seconds: float = 10.0
    pause_seconds: float = 0.0
    backoff_seconds: float = 5.0
    backoff_max_seconds: float = 600.0
    rounds: int = 0
    evaluate_every: int = 1
    folds_always: bool = False
    secure: SecurePolicy = "plain"
    mask_seconds: float = 60.0
    mode: RoundMode = "sync"
    max_staleness: int = 10
    staleness_exponent: float = 0.5

    def __post_init__(self) -> None:
        least = {
            "quorum": 1,
            "goal": 0,
            "round_seconds": 1e-3,
            "evaluate_seconds": 1e-3,
            "resend_seconds": 1e-3,
            "grace_seconds": 0,
            "pause_seconds": 0,
            "backoff_seconds": 0,
            "backoff_max_seconds": 0,
            "rounds": 0,
            "evaluate_every": 0,
            "mask_seconds": 1e-3,
            "max_staleness": 0,
            "staleness_exponent": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < bound:
                raise ConfigurationError(
                    f"rounds: {name} is {value}", hint=f"use a number from {bound} up", name=name
                )
        if 0 < self.goal < self.quorum:
            raise ConfigurationError(
                f"rounds: goal {self.goal} is below the quorum {self.quorum}",
                hint="a round that closes at its goal could never be folded: raise goal or lower quorum",
                name="goal",
            )
        if self.is_buffered and not self.goal:
            raise ConfigurationError(
                "rounds: a buffered round ends when so many updates are in, and goal is 0",
                hint="set run.goal to a tenth to a fifth of the devices that are at work at a time",
                name="goal",
            )

    @property
    def is_buffered(self) -> bool:
        """Whether an update outlives the round that asked for it."""
        return self.mode == "buffered"

    @property
    def is_masked(self) -> bool:
        """Whether the cloud learns sums only."""
        return self.secure != "plain"

    def resend_after(self, cohort: int) -> float:
        """Seconds after which orders of so many devices are sent again: many answers take us a while, and whoever is
        asked again meanwhile answers again."""
        return max(self.resend_seconds, cohort / ANSWERS_PER_SECOND)

    def backoff(self, failures: int) -> float:
        """Seconds of rest after a round failed, when so many had failed in a row before it."""
        return min(self.backoff_max_seconds, self.backoff_seconds * 2.0 ** min(failures, 60))


class Members(Mapping[str, Standing]):
    """Members of a cohort and how each stands; a change makes another one and costs no pass over all of them.

    A few changes lie beside what they change; when they are many, a new whole is made, so that n changes of a cohort of
    m cost n · m / `_MOST_CHANGES` copied entries.
    """

    __slots__ = ("_changes", "_whole")

    def __init__(self, whole: Mapping[str, Standing], changes: Mapping[str, Standing] | None = None) -> None:
        self._whole = whole
        self._changes = changes or {}

    def __getitem__(self, device: str) -> Standing:
        found = self._changes.get(device)
        return self._whole[device] if found is None else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)

    def __repr__(self) -> str:
        return f"Members({dict(self)!r})"

    def changed(self, device: str, standing: Standing) -> Members:
        """With another standing of one of them."""
        changes = {**self._changes, device: standing}
        if len(changes) < _MOST_CHANGES:
            return Members(self._whole, changes)
        return Members({**self._whole, **changes})


_MOST_CHANGES = 128


@dataclass(frozen=True, slots=True)
class Collection:
    """The cohort whose replies are awaited, and how each member stands.

    The counts are kept beside the members, so that a move costs no pass over a large cohort.

    Attributes:
        lost_at: when a member was last lost; what a collection short of its quorum counts its grace from.
    """

    members: Members
    outstanding: int
    answered: int = 0
    lost: int = 0
    lost_at: float = -NEVER

    @classmethod
    def of(cls, standings: Mapping[str, Standing]) -> Collection:
        values = list(standings.values())
        return cls(
            Members(standings),
            outstanding=sum(value in OUTSTANDING for value in values),
            answered=values.count(Standing.ANSWERED),
            lost=values.count(Standing.LOST),
        )

    def move(self, device: str, standing: Standing, now: float) -> Collection:
        """One member's new standing. An answered or refused one keeps its own, whatever comes later."""
        old = self.members.get(device)
        if old is None or old in _FINAL or old is standing:
            return self
        return Collection(
            self.members.changed(device, standing),
            outstanding=self.outstanding + (standing in OUTSTANDING) - (old in OUTSTANDING),
            answered=self.answered + (standing is Standing.ANSWERED),
            lost=self.lost + (standing is Standing.LOST) - (old is Standing.LOST),
            lost_at=now if standing is Standing.LOST else self.lost_at,
        )


NOBODY = Collection(Members({}), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundState:
    """All that the machine knows: counts `round_number` attempts from 1, `moved` of them moved the head.

    Attributes:
        return_seconds: over which the fleet is asked to spread its return.
    """

    phase: Phase = Phase.IDLE
    round_number: int = 0
    moved: int = 0
    failures: int = 0
    is_paused: bool = False
    present: frozenset[str] = frozenset()
    return_seconds: float = 0.0
    cohort: Collection = NOBODY
    deadline: float = NEVER
    resend_at: float = NEVER
    not_before: float = 0.0
