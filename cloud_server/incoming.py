"""What waits between the transport's thread and the loop's: bounded, and never dropped.

What was read from the broker was acknowledged to it, so it must not be thrown away for lack of room. When too much
waits, the transport stops reading: TCP and MQTT's receive maximum then hold the broker back, which keeps what is ours
within its limits. Laws of the file: `put` never blocks; more than the room waits only by what one turn of the transport
had read already. Source: docs/architecture.md (the aggregator), docs/protocol.md, clause 10.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from wire.transport import Received, TransportEvent

ROOM = 65_536
ROOM_BYTES = 256 * 1024 * 1024


class Incoming:
    """A queue of events with a brake; None only wakes whoever waits.

    Args:
        pause: makes the transport stop reading, or read again; from any thread.
        room, room_bytes: events, and payload bytes of them, from which on reading stops; below half it goes on.

    Attributes:
        paused_total: how often reading was stopped.
    """

    def __init__(
        self, pause: Callable[[bool], None], *, room: int = ROOM, room_bytes: int = ROOM_BYTES
    ) -> None:
        self._pause = pause
        self.room = room
        self._room_bytes = room_bytes
        self._queue: queue.SimpleQueue[TransportEvent | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # Each is written by one thread alone.
        self._put_bytes = self._taken_bytes = 0
        self._is_paused = False
        self.paused_total = 0

    def waiting(self) -> int:
        """Events that wait."""
        return self._queue.qsize()

    def put(self, event: TransportEvent | None) -> None:
        """From the transport's thread; None from any."""
        if isinstance(event, Received):
            self._put_bytes += len(event.packet.payload)
        self._queue.put(event)
        if not self._is_paused and self._is_above(self.room, self._room_bytes):
            self._brake()

    def take(self, wait: float) -> TransportEvent | None:
        """The oldest event, waiting so many seconds for one; from the loop's thread.

        Raises:
            queue.Empty: there was none.
        """
        event = self._queue.get(timeout=wait) if wait > 0 else self._queue.get_nowait()
        if isinstance(event, Received):
            self._taken_bytes += len(event.packet.payload)
        with self._lock:
            if self._is_paused and not self._is_above(self.room // 2, self._room_bytes // 2):
                self._is_paused = False
                self._pause(False)
        return event

    def _is_above(self, events: int, size_bytes: int) -> bool:
        return self._queue.qsize() >= max(1, events) or self._put_bytes - self._taken_bytes >= max(
            1, size_bytes
        )

    def _brake(self) -> None:
        with self._lock:
            # Whoever takes looks after each event: between our look and the lock the queue may have been emptied.
            if not self._is_paused and self._is_above(self.room, self._room_bytes):
                self._is_paused = True
                self.paused_total += 1
                self._pause(True)
