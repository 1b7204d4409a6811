"""Whether a process lives and whether it can do its work: what `/healthz`, `/readyz` and systemd are told.

Laws of the file: the loop that matters beats, and nothing beats for it; reading costs nothing and may come from any
thread; whoever asks learns one word, no reason: probes are not authenticated.
"""

from __future__ import annotations

import threading
from typing import Final

from process.clock import Clock
from process.service_manager import ServiceManager

ALIVE: Final = "/healthz"
READY: Final = "/readyz"
_FEEDS_PER_WATCHDOG: Final = 4.0
_LEAST_FEED_SECONDS: Final = 1.0


class Pulse:
    """The beat of one loop.

    Args:
        stale_seconds: how long the loop may be away (it trains, folds, waits for a disk) and still counts as alive.
    """

    def __init__(self, clock: Clock, *, stale_seconds: float, manager: ServiceManager | None = None) -> None:
        self._clock = clock
        self._stale_seconds = stale_seconds
        self._manager = manager or ServiceManager()
        self._lock = threading.Lock()
        self._beaten_at: float | None = None
        self._fed_at: float | None = None
        self._is_ready = False
        self._is_standby = False
        self._is_alone = False
        self._is_stopping = False

    @property
    def longest_wait_seconds(self) -> float:
        """The longest that a loop may wait between two beats; infinity when nobody watches."""
        watchdog = self._manager.watchdog_seconds
        return watchdog / _FEEDS_PER_WATCHDOG if watchdog else float("inf")

    def beat(self, *, is_ready: bool, status: str = "", is_alone: bool = False) -> None:
        """The loop came round. On its own thread; the first beat tells the service manager that we are up.

        Args:
            is_alone: what it does it does, and it cannot speak to the other side before a person has been there.
        """
        now = self._clock.monotonic()
        with self._lock:
            is_first = self._beaten_at is None
            self._beaten_at, self._is_ready, self._is_standby = now, is_ready, False
            self._is_alone = is_alone
        self._tell(now, status, is_first=is_first)

    def stand_by(self, status: str = "") -> None:
        """The loop that waits for its turn came round: alive, and not ready."""
        now = self._clock.monotonic()
        with self._lock:
            is_first = self._beaten_at is None
            self._beaten_at, self._is_ready, self._is_standby = now, False, True
        self._tell(now, status, is_first=is_first)

    def _tell(self, now: float, status: str, *, is_first: bool) -> None:
        if is_first:
            self._manager.ready()
        rest = max(_LEAST_FEED_SECONDS, self.longest_wait_seconds / 2.0)
        if self._manager.watchdog_seconds and (self._fed_at is None or now - self._fed_at >= rest):
            self._fed_at = now
            self._manager.alive(status)

    def stop(self) -> None:
        """The stop has begun: nothing is ready any more."""
        with self._lock:
            self._is_stopping, self._is_ready = True, False
        self._manager.stopping()

    @property
    def is_alive(self) -> bool:
        """Whether the loop came round lately; also before its first beat and while it stops."""
        with self._lock:
            beaten_at = self._beaten_at
        return beaten_at is None or self._clock.monotonic() - beaten_at <= self._stale_seconds

    @property
    def is_ready(self) -> bool:
        """Whether requests are served: false before the first beat, while it stops and when the loop hangs."""
        return self._is_ready and self.is_alive

    def answer(self, path: str) -> tuple[int, str] | None:
        """HTTP status and one word for a probe; None for another path."""
        if path == ALIVE:
            return (200, "ok") if self.is_alive else (503, "stuck")
        if path == READY:
            if self.is_ready:
                return 200, "alone" if self._is_alone else "ready"
            return 503, "standby" if self._is_standby and self.is_alive else "not ready"
        return None
