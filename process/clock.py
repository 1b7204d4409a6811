"""The clock as an argument: nothing in a core reads the time by itself (a simulated fleet runs on a virtual
one).
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings of time; both in seconds."""

    def now(self) -> float:
        """Wall clock, seconds since 1970 (UTC). May jump; never used for durations."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back. Used for every time-out and back-off."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()
