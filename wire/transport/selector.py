"""One thread that waits for many sockets: readiness, timers and calls from other threads.

paho's own thread per client stops at 338 clients and its `select` breaks above descriptor 1,020, so every
MQTT client of a process may share one of these. Laws: sockets are touched only on the loop's thread; a
callback that raises is logged and the loop goes on; stopping is bounded in time.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

_log = logging.getLogger("wire.transport.selector")

Task = Callable[[], None]
Ready = Callable[[int], None]


class HasFileno(Protocol):
    """Anything that a selector can wait for."""

    def fileno(self) -> int: ...


class Timer:
    """A call to be made later; `cancel` may come from any thread."""

    __slots__ = ("_task",)

    def __init__(self, task: Task) -> None:
        self._task: Task | None = task

    def cancel(self) -> None:
        self._task = None

    def fire(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task()


class SelectorLoop:
    """A selector, a heap of timers and a queue of calls, served by one daemon thread.

    Args:
        name: the thread's name.
    """

    def __init__(self, name: str = "shoal-mqtt") -> None:
        self._name = name
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Task] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._woken = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._drain_wake)

    def start(self) -> None:
        """Starts the thread; does nothing when it runs.

        Raises:
            RuntimeError: the loop was stopped before.
        """
        with self._lock:
            if self._stopping:
                raise RuntimeError("a stopped loop does not start again")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def stop(self, timeout_seconds: float = 5.0) -> None:
        """Ends the thread after the call that it is in; what is queued is dropped. Safe to call twice."""
        with self._lock:
            started, self._stopping = self._thread, True
        if started is None:
            self._close()
            return
        self._wake()
        if not self.is_current():
            started.join(timeout_seconds)

    @property
    def is_running(self) -> bool:
        """Whether the thread serves calls."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    def is_current(self) -> bool:
        """Whether the caller is on the loop's thread."""
        return self._thread is threading.current_thread()

    def call_soon(self, task: Task) -> None:
        """Queues a call for the loop's thread; safe from any thread."""
        self._calls.append(task)
        if not self.is_current():
            self._wake()

    def call_later(self, delay_seconds: float, task: Task) -> Timer:
        """Makes a call after a delay, on the loop's thread; safe from any thread."""
        timer = Timer(task)
        due = time.monotonic() + delay_seconds
        with self._lock:
            heapq.heappush(self._timers, (due, next(self._order), timer))
        if not self.is_current():
            self._wake()
        return timer

    def register(self, source: HasFileno, events: int, ready: Ready) -> None:
        """Calls `ready(events)` whenever `source` is ready, until it raises. Loop's thread only."""
        self._selector.register(source, events, ready)

    def modify(self, source: HasFileno, events: int, ready: Ready) -> None:
        """Changes what a registered source waits for. Loop's thread only."""
        self._selector.modify(source, events, ready)

    def unregister(self, source: HasFileno | int) -> None:
        """Forgets a source; one that was never registered is no error. Loop's thread only."""
        try:
            self._selector.unregister(source)
        except (KeyError, ValueError):
            return

    def _run(self) -> None:
        try:
            while not self._stopping:
                for key, events in self._selector.select(self._timeout()):
                    if not self._guard(key.data, events):
                        self.unregister(key.fileobj)  # it would fail again at once, for ever
                self._fire_timers()
                for _ in range(len(self._calls)):
                    self._guard(self._calls.popleft())
        finally:
            self._close()

    def _timeout(self) -> float | None:
        if self._calls:
            return 0.0
        with self._lock:
            if not self._timers:
                return None
            return max(0.0, self._timers[0][0] - time.monotonic())

    def _fire_timers(self) -> None:
        now = time.monotonic()
        while True:
            with self._lock:
                if not self._timers or self._timers[0][0] > now:
                    return
                timer = heapq.heappop(self._timers)[2]
            self._guard(timer.fire)

    def _guard(self, call: Callable[..., None], *arguments: Any) -> bool:
        try:
            call(*arguments)
            return True
        except Exception:  # noqa: BLE001 — the outermost loop of the thread: one client's fault must not end all others
            _log.exception("callback_failed")
            return False

    def _wake(self) -> None:
        with self._lock:
            if self._woken:
                return
            self._woken = True
            try:
                self._wake_writer.send(b"\0")
            except OSError:  # closed, or full: then a wake-up is under way
                return

    def _drain_wake(self, _events: int) -> None:
        with self._lock:
            self._woken = False
            try:
                self._wake_reader.recv(4096)
            except BlockingIOError:
                return

    def _close(self) -> None:
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()
