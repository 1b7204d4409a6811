"""The seam between Shoal and a message broker: what a transport is given and what it reports.

Three transports stand behind it: `mqtt.py` (MQTT 5, paho), `memory.py` (one process, deterministic),
`faulty.py` (a wrapper that loses, doubles, delays and corrupts by seed). Laws: a transport never blocks its
caller; it calls `deliver` from its own thread (MQTT) or from `pump` (memory), and the receiver may only
enqueue; it never queues without bound. Delivery is a hint: receipts and digests decide what arrived
(docs/protocol.md, clause 10).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

UNTRUSTED: Final = "certificate verify failed"
REFUSED_IN_TLS: Final = "the other side refused us in TLS"
"""How the reasons begin that speak of certificates."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One publication. `expiry_seconds` None: it stays until delivered."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False
    expiry_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted us and our subscriptions: nothing that is published from now on is missed.

    `max_packet_bytes` and `receive_maximum` are CONNACK's, never above our own.
    """

    session_present: bool
    max_packet_bytes: int
    receive_maximum: int


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone, or an attempt failed; the transport tries again (exponential back-off, full
    jitter).
    """

    reason: str

    @property
    def is_distrust(self) -> bool:
        """Whether one side does not take the other's certificate."""
        return self.reason.startswith((UNTRUSTED, REFUSED_IN_TLS))


@dataclass(frozen=True, slots=True)
class Received:
    """A publication for one of our filters."""

    packet: Packet


@dataclass(frozen=True, slots=True)
class Published:
    """The broker took (or refused) the publication that `publish` returned `token` for. Not a receipt."""

    token: int
    accepted: bool
    reason: str = ""


TransportEvent = Connected | Disconnected | Received | Published
Deliver = Callable[[TransportEvent], None]


class Monotonic(Protocol):
    """The one reading of time that a transport needs; a `process.clock.Clock` has it."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...


class Transport(Protocol):
    """One client of a broker."""

    def start(
        self, deliver: Deliver, *, filters: Sequence[tuple[str, int]], will: Packet | None = None
    ) -> None:
        """Connects, keeps connected, subscribes to (topic filter, qos) at every new session."""
        ...

    def publish(self, packet: Packet) -> int:
        """Queues one publication and returns its token.

        Raises:
            BackpressureError: the in-flight window and queue are full, or there is no connection.
            OversizeError: larger than the broker said it accepts.
        """
        ...

    def stop(self, last_words: Packet | None = None) -> None:
        """Publishes `last_words` if it can, disconnects cleanly and frees the thread. Safe to call twice."""
        ...


class DroppableTransport(Transport, Protocol):
    """A transport whose connection can be cut on purpose: what fault injection needs."""

    def drop(self, reason: str = ...) -> None:
        """Cuts the connection without a goodbye: the will goes out, then the transport reconnects."""
        ...
