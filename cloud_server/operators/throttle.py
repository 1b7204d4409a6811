"""How often somebody may be wrong: a limit on failed requests of one address. Pure; time is an argument.

Laws of the file: only failures are counted, so that work is never slowed down; who is over the limit is turned away
before his token is looked at, and his refused requests count no further (a wrong script heals by waiting); the
table of addresses is bounded, the oldest leave it first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Final

MAX_FAILURES: Final = 10
WINDOW_SECONDS: Final = 60.0
MAX_ADDRESSES: Final = 4096


class FailureLimit:
    """Failures by address within a window. Safe to use from many threads."""

    def __init__(
        self,
        *,
        failures: int = MAX_FAILURES,
        window_seconds: float = WINDOW_SECONDS,
        addresses: int = MAX_ADDRESSES,
    ) -> None:
        self._failures = failures
        self._window = window_seconds
        self._addresses = addresses
        self._times: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait_seconds(self, address: str, now: float) -> float:
        """How long an address has to wait before it is heard again; 0 for not at all."""
        with self._lock:
            times = self._recent(address, now)
            return 0.0 if len(times) < self._failures else max(0.0, times[0] + self._window - now)

    def note_failure(self, address: str, now: float) -> bool:
        """Counts a failure; True for the one that reaches the limit."""
        with self._lock:
            times = self._recent(address, now)
            times.append(now)
            self._times[address] = times
            self._times.move_to_end(address)
            while len(self._times) > self._addresses:
                self._times.popitem(last=False)
            return len(times) == self._failures

    def _recent(self, address: str, now: float) -> deque[float]:
        times = self._times.get(address, deque())
        while times and now - times[0] >= self._window:
            times.popleft()
        if not times:
            self._times.pop(address, None)
        return times
