"""What is kept of histories: one record each, in a file that a campaign goes on from; and the failures of old.

Laws of the file: a campaign's file is replaced as a whole after each history, so that it is whole whenever it is cut
off; a history that failed is played again by whoever goes on, for what it found may be repaired; a file of other faults
is an error, never mixed in.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fleet.chaos.faults import Fault
from fleet.chaos.world import Outcome
from wire.errors import ConfigurationError, StorageError

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class History:
    """What is counted of one history.

    Attributes:
        points, kinds: of the faults that struck.
        standings: where its updates are.
        violations: in words; empty for a sound one.
        cpu_seconds: that playing it took.
    """

    seed: int
    made: int
    points: dict[str, int]
    kinds: dict[str, int]
    standings: dict[str, int]
    violations: tuple[str, ...]
    lost: int
    doubled: int
    rounds: int
    virtual_seconds: float
    cpu_seconds: float

    @classmethod
    def of(cls, outcome: Outcome, cpu_seconds: float) -> History:
        """Without what only a replay needs."""
        return cls(
            seed=outcome.seed,
            made=outcome.made,
            points=dict(Counter(fault.point for fault in outcome.struck)),
            kinds=dict(Counter(fault.kind for fault in outcome.struck)),
            standings=dict(outcome.standings),
            violations=tuple(str(each) for each in outcome.violations),
            lost=outcome.lost,
            doubled=outcome.doubled,
            rounds=outcome.rounds,
            virtual_seconds=outcome.virtual_seconds,
            cpu_seconds=cpu_seconds,
        )


class CampaignFile:
    """A campaign that can be gone on with.

    Args:
        path: of the file; None keeps nothing.
        faults: of each history.

    Raises:
        ConfigurationError: (operator) the file is of another campaign, or none of ours.
    """

    def __init__(self, path: Path | None, faults: int) -> None:
        self._path = path
        self._faults = faults
        self._histories: dict[int, History] = {}
        if path is not None and path.exists():
            self._histories = {each.seed: each for each in _read(path, faults) if not each.violations}

    def of(self, seeds: Iterable[int]) -> list[History]:
        """What was played of these seeds, and was sound."""
        return [self._histories[seed] for seed in seeds if seed in self._histories]

    def add(self, history: History) -> None:
        """Keeps one more.

        Raises:
            StorageError: (disk) it cannot be written.
        """
        self._histories[history.seed] = history
        if self._path is None:
            return
        found = [asdict(self._histories[seed]) for seed in sorted(self._histories)]
        _replace(self._path, {"format": _FORMAT, "faults": self._faults, "histories": found})


def keep_regression(path: Path, name: str, what: str, play: str, seed: int, faults: Sequence[Fault]) -> None:
    """Adds a failing history to a file of those that must not fail again; the same one once.

    Raises:
        StorageError: (disk) it cannot be read or written.
    """
    kept: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    plain = [fault.to_plain() for fault in faults]
    if any(each["seed"] == seed and each["faults"] == plain for each in kept):
        return
    _replace(path, [*kept, {"name": name, "what": what, "play": play, "seed": seed, "faults": plain}])


def _read(path: Path, faults: int) -> list[History]:
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        found = [History(**{**each, "violations": tuple(each["violations"])}) for each in plain["histories"]]
        is_ours = plain["format"] == _FORMAT and plain["faults"] == faults
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is no campaign", hint="name another file") from error
    if not is_ours:
        raise ConfigurationError(
            f"{path} is of a campaign of {plain['faults']} faults a history, not {faults}",
            hint="name another file, or the same number of faults",
        )
    return found


def _replace(path: Path, plain: object) -> None:
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
