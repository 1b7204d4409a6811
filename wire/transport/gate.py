"""Where callers' threads meet the loop's: what may be published now, under one lock.

Laws: nothing above the broker's limit passes; without a connection nothing is accepted (the caller's own
outbox keeps it); a caller never waits. Source: docs/protocol.md, clause 10.
"""

from __future__ import annotations

import threading

from wire.errors import BackpressureError, OversizeError
from wire.transport import Packet
from wire.transport.topic_filters import check_packet, publish_size_bytes
from wire.transport.window import Entry, SendWindow


class SendGate:
    """A `SendWindow` that is open while there is a connection. Safe from any thread."""

    def __init__(self, window: SendWindow) -> None:
        self._window = window
        self._lock = threading.Lock()
        self._limit_bytes = 0  # 0: no connection
        self._stopping = False

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._limit_bytes > 0

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        with self._lock:
            return self._window.is_idle

    def admit(self, packet: Packet) -> int:
        """Queues a publication and returns its token.

        Raises:
            BackpressureError: the queue is full, or there is no connection.
            OversizeError: larger than the broker accepts.
            ConfigurationError: (us) a topic or QoS that cannot be published.
        """
        check_packet(packet)
        with self._lock:
            check_room(packet, 0 if self._stopping else self._limit_bytes)
            return self._window.push(packet)

    def open(self, limit_bytes: int, receive_maximum: int) -> list[int]:
        """There is a connection; returns the tokens of what waits but is too large for it."""
        with self._lock:
            self._limit_bytes = limit_bytes
            self._window.set_receive_maximum(receive_maximum)
            return self._window.drop_larger(limit_bytes)

    def shut(self) -> list[int]:
        """The connection is gone; returns the tokens of what is lost with it (QoS 0)."""
        with self._lock:
            self._limit_bytes = 0
            return self._window.connection_lost()

    def stop(self, last_words: Packet | None) -> bool:
        """Accepts nothing more but the last words, if they fit; False when it was stopped before."""
        with self._lock:
            first, self._stopping = not self._stopping, True
            if first and last_words is not None and publish_size_bytes(last_words) <= self._limit_bytes:
                self._window.push(last_words, unbounded=True)
            return first

    def take(self, now: float) -> Entry | None:
        """The next publication to send, or None."""
        with self._lock:
            return self._window.take(now)

    def settle(self, token: int) -> bool:
        """Takes a publication out of flight; False when it was not there."""
        with self._lock:
            return self._window.settle(token)

    def oldest_since(self) -> float | None:
        """When the oldest publication in flight was taken, or None."""
        with self._lock:
            return self._window.oldest_since()

    def drop_all(self) -> list[int]:
        """Forgets everything and returns the tokens."""
        with self._lock:
            return self._window.drop_all()


def check_room(packet: Packet, limit_bytes: int) -> None:
    """Refuses what cannot be published on a connection with this limit (0: there is none).

    Raises:
        BackpressureError: there is no connection.
        OversizeError: the packet is larger than the limit.
    """
    if not limit_bytes:
        raise BackpressureError("there is no connection to the broker", hint="publish after Connected")
    size = publish_size_bytes(packet)
    if size > limit_bytes:
        raise OversizeError(
            f"a packet of {size} bytes is above the broker's limit of {limit_bytes}",
            hint="cut it into chunks",
            size_bytes=size,
            limit_bytes=limit_bytes,
        )
