"""Rows of a benchmark: a ratio, its goal, and how it was taken; as a table for people and JSON for scripts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        name: what is compared with what.
        value: a ratio (or, where it says so in `unit`, an amount).
        goal: `>= x` or `<= x`, or empty where there is none.
        unit: `x` for a ratio.
        note: sizes, repeats, the absolute figures behind the ratio.
    """

    name: str
    value: float
    goal: str = ""
    unit: str = "x"
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return self.value >= float(bound) if sign == ">=" else self.value <= float(bound)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_met": self.is_met}


def render(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    width = max((len(row.name) for row in rows), default=4)
    words = {True: "met", False: "MISSED", None: ""}
    lines = [f"{'figure':<{width}}  {'value':>9}  {'goal':>9}  {'':<6}  note"]
    for row in rows:
        value = f"{row.value:.3g} {row.unit}"
        lines.append(f"{row.name:<{width}}  {value:>9}  {row.goal:>9}  {words[row.is_met]:<6}  {row.note}")
    return "\n".join(lines) + "\n"


def interleaved_medians(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    repeats: int = 15,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Median seconds of two calls that take turns, so that a busy neighbour slows both.

    Args:
        clock: `time.thread_time` where each call is the work of this thread alone: then the time that a neighbour
            had the processor does not count.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for call in (first, second):
        call()
    for _ in range(repeats):
        for call, taken in zip((first, second), times, strict=True):
            start = clock()
            call()
            taken.append(clock() - start)
    return statistics.median(times[0]), statistics.median(times[1])
