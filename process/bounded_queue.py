"""A queue between threads that has a bound in items and in bytes, and never makes the one who puts wait.

Laws of the file: what comes from outside is dropped when it does not fit, and counted: who sent it sends it again until
there is a receipt; what the process tells itself always fits, because each of those has one cause that waits for it
(a job, a timer, a signal).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """First in, first out. Any thread puts, one gets.

    Args:
        most: items at a time.
        most_bytes: of all that wait together; one item may be larger when nothing else waits.
        weigh: bytes of an item.

    Attributes:
        dropped_total: items that did not fit.
    """

    def __init__(self, most: int, most_bytes: int, weigh: Callable[[T], int]) -> None:
        self.most = most
        self._most_bytes = most_bytes
        self._weigh = weigh
        self._items: queue.SimpleQueue[tuple[T, int]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._bytes = 0
        self.dropped_total = 0

    def qsize(self) -> int:
        """How many wait."""
        return self._items.qsize()

    @property
    def waiting_bytes(self) -> int:
        """How much they weigh."""
        return self._bytes

    def offer(self, item: T) -> bool:
        """Puts something from outside; False when it does not fit and is dropped."""
        weight = self._weigh(item)
        with self._lock:
            waiting = self._items.qsize()
            if waiting >= self.most or (waiting and self._bytes + weight > self._most_bytes):
                self.dropped_total += 1
                return False
            self._bytes += weight
        self._items.put((item, weight))
        return True

    def put(self, item: T) -> None:
        """Puts something of our own."""
        self._items.put((item, 0))

    def get(self, timeout: float | None = None) -> T:
        """The next; waits so long for it (None: for ever; 0: not at all).

        Raises:
            queue.Empty: there is none.
        """
        item, weight = self._items.get(timeout=timeout) if timeout != 0 else self._items.get_nowait()
        with self._lock:
            self._bytes -= weight
        return item
