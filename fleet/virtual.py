"""Virtual time: a clock that moves only when told to, and what shall happen at which moment.

Laws of the file: one thread; things due at the same moment happen in the order in which they were asked for, so the
same calls give the same history.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

START = 1_767_225_600.0
"""2026-01-01 00:00 UTC: where every simulation begins, so that times in its books do not differ between runs."""


class VirtualTime:
    """A `process.clock.Clock` with a plan of calls."""

    def __init__(self, start: float = START) -> None:
        self._start = start
        self._now = start
        self._plan: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._now - self._start

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Plans a call `seconds` from now (at once for 0 or less: still not before `run_due`)."""
        heapq.heappush(self._plan, (self._now + max(0.0, seconds), next(self._count), call))

    def next_due(self) -> float | None:
        """Unix seconds of the earliest planned call, or None."""
        return self._plan[0][0] if self._plan else None

    def run_due(self) -> int:
        """Makes every call that is due, also those that are planned meanwhile for now; returns how many."""
        calls = 0
        while self._plan and self._plan[0][0] <= self._now:
            _, _, call = heapq.heappop(self._plan)
            call()
            calls += 1
        return calls

    def advance_to(self, moment: float) -> None:
        """Moves the clock forward; a moment that has passed changes nothing."""
        self._now = max(self._now, moment)
