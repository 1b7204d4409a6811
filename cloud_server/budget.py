"""Token buckets: how much of something may happen, all at once and in the long run.

Laws of the file: pure; time is an argument, and one that goes back gives nothing and takes nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What a bucket holds when it is full, and what it gains in a second."""

    burst: float
    per_second: float


class Bucket:
    """A full bucket at first."""

    __slots__ = ("_allowance", "_at", "_level")

    def __init__(self, allowance: Allowance, now: float) -> None:
        self._allowance = allowance
        self._level = allowance.burst
        self._at = now

    def level(self, now: float) -> float:
        """How much may happen now."""
        gained = max(0.0, now - self._at) * self._allowance.per_second
        self._level = min(self._allowance.burst, self._level + gained)
        self._at = now
        return self._level

    def spend(self, amount: float) -> None:
        """Takes out; at most what `level` said."""
        self._level = max(0.0, self._level - amount)


class Buckets:
    """One bucket for each of many names, of which the `limit` that spoke last are remembered."""

    def __init__(self, allowance: Allowance, limit: int) -> None:
        self._allowance = allowance
        self._limit = limit
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def of(self, name: str, now: float) -> Bucket:
        """The bucket of a name, a full one for a name that is not remembered."""
        bucket = self._buckets.pop(name, None) or Bucket(self._allowance, now)
        self._buckets[name] = bucket
        while len(self._buckets) > self._limit:
            self._buckets.popitem(last=False)
        return bucket
