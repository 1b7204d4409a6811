"""Where faults wait and strike: the one place that counts them, and the trace of a history.

Laws of the file: a fault strikes once, at its point, and only while work is in flight; one that finds none is never
counted; the same schedule and the same visits give the same strikes.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fleet.chaos.faults import Fault


class Crash(BaseException):
    """The process ends here: no handler of the product's may go on after it."""

    def __init__(self, fault: Fault | None) -> None:
        super().__init__("" if fault is None else f"{fault.kind} at {fault.point}")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a trace: virtual seconds, who, what."""

    at: float
    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.at:10.3f}  {self.who:<10}  {self.what}"


class Injector:
    """Hands out the faults of one schedule.

    Args:
        schedule: by `after`.
        now: virtual seconds, for the trace.
        is_in_flight: whether there is work that a fault could harm.
        tell: takes every line of the trace; None keeps none.

    Attributes:
        visits: how often each point was passed, struck or not.
        struck: the faults that struck, in order.
    """

    def __init__(
        self,
        schedule: Sequence[Fault],
        now: Callable[[], float],
        is_in_flight: Callable[[], bool],
        tell: Callable[[Line], None] | None = None,
    ) -> None:
        self._coming = deque(sorted(schedule, key=lambda fault: (fault.after, fault.number)))
        self._waiting: dict[str, deque[Fault]] = defaultdict(deque)
        self._now = now
        self._is_in_flight = is_in_flight
        self._tell = tell
        self.visits: Counter[str] = Counter()
        self.struck: list[Fault] = []

    @property
    def is_done(self) -> bool:
        """Whether every fault of the schedule struck."""
        return not self._coming and not any(self._waiting.values())

    @property
    def all_armed(self) -> bool:
        """Whether every fault waits at its point by now, or has struck."""
        return not self._coming

    def arm(self, made: int) -> None:
        """Lets the faults wait whose time has come.

        Args:
            made: updates so far.
        """
        while self._coming and self._coming[0].after <= made:
            fault = self._coming.popleft()
            self._waiting[fault.point].append(fault)

    def calm(self) -> None:
        """No fault strikes from now on."""
        self._coming.clear()
        self._waiting.clear()

    def visit(self, point: str, who: str) -> Fault | None:
        """The fault that strikes here and now, or None."""
        self.visits[point] += 1
        waiting = self._waiting.get(point)
        if not waiting or not self._is_in_flight():
            return None
        fault = waiting.popleft()
        self.struck.append(fault)
        self.note(who, f"FAULT {fault.number}: {fault.kind} at {point}")
        return fault

    def note(self, who: str, what: str) -> None:
        """A line of the trace."""
        if self._tell is not None:
            self._tell(Line(self._now(), who, what))
