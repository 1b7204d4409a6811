"""What waits to be sent and what waits for its acknowledgement: a pure core, no socket and no lock.

Laws: it never holds more than its limits; the order of publication is kept; a QoS 1 publication that was in
flight when the connection went is sent again first, a QoS 0 one is lost and reported. Source:
docs/protocol.md, clause 10; MQTT 5.0, clauses 3.3.4 (Receive Maximum) and 4.4 (delivery retry).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from wire.errors import BackpressureError
from wire.transport import Packet
from wire.transport.topic_filters import publish_size_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One publication under way."""

    token: int
    packet: Packet
    size_bytes: int


class SendWindow:
    """The queue and the in-flight window of one client.

    Args:
        inflight_window: publications handed to the connection and not yet acknowledged, at most.
        queue_packets: publications that wait behind the window, at most.
        queue_bytes: bytes of those, at most.
    """

    def __init__(self, inflight_window: int, queue_packets: int, queue_bytes: int) -> None:
        self._own_window = self._window = inflight_window
        self._queue_packets = queue_packets
        self._queue_bytes = queue_bytes
        self._queued: deque[Entry] = deque()
        self._queued_bytes = 0
        self._inflight: OrderedDict[int, tuple[Entry, float]] = OrderedDict()
        self._last_token = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return not self._queued and not self._inflight

    def set_receive_maximum(self, receive_maximum: int) -> None:
        """Narrows the window to what the broker said; a later connection may widen it again."""
        self._window = max(1, min(self._own_window, receive_maximum))

    def push(self, packet: Packet, *, unbounded: bool = False) -> int:
        """Queues a publication and returns its token (from 1).

        Raises:
            BackpressureError: the queue is full by count or by bytes, unless `unbounded` (last words).
        """
        size = publish_size_bytes(packet)
        full = len(self._queued) >= self._queue_packets or self._queued_bytes + size > self._queue_bytes
        if full and not unbounded and self._queued:
            raise BackpressureError(
                "the send queue is full",
                hint="publish again after a Published event",
                queued=len(self._queued),
                queued_bytes=self._queued_bytes,
            )
        self._last_token += 1
        self._queued.append(Entry(self._last_token, packet, size))
        self._queued_bytes += size
        return self._last_token

    def take(self, now: float) -> Entry | None:
        """Moves the next publication into flight, or None when the window is full or nothing waits."""
        if not self._queued or len(self._inflight) >= self._window:
            return None
        entry = self._queued.popleft()
        self._queued_bytes -= entry.size_bytes
        self._inflight[entry.token] = (entry, now)
        return entry

    def settle(self, token: int) -> bool:
        """Takes a publication out of flight; False when it was not there."""
        return self._inflight.pop(token, None) is not None

    def oldest_since(self) -> float | None:
        """When the oldest publication in flight was taken, or None."""
        for _, since in self._inflight.values():
            return since
        return None

    def connection_lost(self) -> list[int]:
        """Puts QoS 1 publications in flight back in front and returns the tokens of the QoS 0 ones, which are
        lost.
        """
        lost = [token for token, (entry, _) in self._inflight.items() if entry.packet.qos == 0]
        again = [entry for entry, _ in self._inflight.values() if entry.packet.qos > 0]
        self._inflight.clear()
        self._queued.extendleft(reversed(again))
        self._queued_bytes += sum(entry.size_bytes for entry in again)
        return lost

    def drop_larger(self, limit_bytes: int) -> list[int]:
        """Forgets queued publications above a limit (a broker that came back stricter) and returns their
        tokens.
        """
        dropped = [entry.token for entry in self._queued if entry.size_bytes > limit_bytes]
        if dropped:
            self._queued = deque(entry for entry in self._queued if entry.size_bytes <= limit_bytes)
            self._queued_bytes = sum(entry.size_bytes for entry in self._queued)
        return dropped

    def drop_all(self) -> list[int]:
        """Forgets everything and returns the tokens, oldest first."""
        tokens = [*self._inflight, *(entry.token for entry in self._queued)]
        self._inflight.clear()
        self._queued.clear()
        self._queued_bytes = 0
        return tokens
