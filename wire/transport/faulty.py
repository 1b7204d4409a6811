"""A transport around another one that does to its packets what a bad network, broker or peer does, by seed.

Faults that need a later moment (delay, reordering, the acknowledgement of what was lost) happen when the next
packet passes or when `tick` is called: no clock and no thread of its own. Laws: the same plan, seed and calls
give the same faults; every fault is counted by its kind; what is not harmed passes unchanged. A lost
publication is still reported as accepted, because that is what a broker with a full queue does (QoS 1 is not
delivery).
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from wire.errors import BackpressureError, ConfigurationError, OversizeError
from wire.transport import (
    Connected,
    Deliver,
    Disconnected,
    DroppableTransport,
    Packet,
    Published,
    Received,
    TransportEvent,
)
from wire.transport.gate import check_room
from wire.transport.topic_filters import check_packet

Direction = Literal["up", "down"]


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The probability (0 to 1) of each fault, for every packet; at most one fault happens to a packet.

    Attributes:
        lose: it never arrives.
        double: it arrives twice.
        reorder: it arrives after the packet behind it.
        delay: it arrives after `delay_packets` further packets, or at the next `tick`.
        truncate: only its beginning arrives.
        corrupt: one bit of it is flipped.
        disconnect: the connection is cut before it passes, and it is lost.
        delay_packets: how many packets overtake a delayed one.
        directions: "up" for what we publish, "down" for what we receive.
    """

    lose: float = 0.0
    double: float = 0.0
    reorder: float = 0.0
    delay: float = 0.0
    truncate: float = 0.0
    corrupt: float = 0.0
    disconnect: float = 0.0
    delay_packets: int = 8
    directions: tuple[Direction, ...] = ("up", "down")

    def __post_init__(self) -> None:
        chances = [getattr(self, kind) for kind in KINDS]
        if min(chances) < 0.0 or sum(chances) > 1.0 or self.delay_packets < 1:
            raise ConfigurationError(
                "a fault plan has probabilities ≥ 0 with a sum ≤ 1, and delays ≥ 1 packet"
            )

    def draw(self, rng: random.Random) -> str:
        """The fault of one packet, or "" for none. One draw, whatever comes out."""
        point = rng.random()
        for kind in KINDS:
            point -= getattr(self, kind)
            if point < 0.0:
                return kind
        return ""


KINDS = tuple(field.name for field in fields(FaultPlan) if field.name not in ("delay_packets", "directions"))


@dataclass(slots=True)
class _Held:
    packet: Packet
    direction: Direction
    passes_left: int


class FaultyTransport:
    """Behind the same seam as the transport that it harms.

    Args:
        inner: the transport that carries what survives.
        plan: what may happen.
        rng: decides; give each transport of a fleet its own.
    """

    def __init__(self, inner: DroppableTransport, plan: FaultPlan, rng: random.Random) -> None:
        self._inner = inner
        self._plan = plan
        self._rng = rng
        self._deliver: Deliver | None = None
        self._lock = threading.RLock()
        self._held: list[_Held] = []
        self._owed: list[TransportEvent] = []
        self._tokens: dict[int, int] = {}
        self._last_token = 0
        self._limit_bytes = 0
        self.faults: Counter[str] = Counter()

    def start(
        self, deliver: Deliver, *, filters: Sequence[tuple[str, int]], will: Packet | None = None
    ) -> None:
        """Starts the inner transport; raises as it does."""
        self._deliver = deliver
        self._inner.start(self._receive, filters=filters, will=will)

    def publish(self, packet: Packet) -> int:
        """Publishes, or does not: the fault decides. Raises as the inner transport does for an unharmed
        packet.
        """
        check_packet(packet)
        with self._lock:
            check_room(packet, self._limit_bytes)
            kind = self._draw("up")
            self._last_token += 1
            token = self._last_token
            if kind == "disconnect":
                self._inner.drop("injected fault")
            if kind in ("lose", "disconnect"):
                why = "" if kind == "lose" else "the connection was lost"
                self._owed.append(Published(token, accepted=not why, reason=why))
            elif kind in ("reorder", "delay"):
                self._hold(packet, "up", kind)
                self._owed.append(Published(token, accepted=True))
                return token
            else:
                sent = harmed(packet, kind, self._rng)
                self._tokens[self._inner.publish(sent)] = token
                if kind == "double":
                    self._publish_unasked(sent)
            self._release_overtaken("up")
            return token

    def drop(self, reason: str = "dropped on purpose") -> None:
        """Cuts the inner connection."""
        self._inner.drop(reason)

    def tick(self) -> None:
        """Lets go of everything that is held, and of the acknowledgements of what was lost."""
        with self._lock:
            held, self._held = self._held, []
            for one in held:
                self._let_go(one)
            self._pay()

    def stop(self, last_words: Packet | None = None) -> None:
        """Stops the inner transport; what is held is lost."""
        with self._lock:
            self._held.clear()
        self._inner.stop(last_words)

    def _receive(self, event: TransportEvent) -> None:
        with self._lock:
            self._pay()
            match event:
                case Received(packet):
                    self._receive_packet(packet)
                case Published(token, accepted, reason):
                    ours = self._tokens.pop(token, None)
                    if ours is not None:
                        self._emit(Published(ours, accepted, reason))
                case Connected():
                    self._limit_bytes = event.max_packet_bytes
                    self._emit(event)
                case Disconnected():
                    self._limit_bytes = 0
                    self._held = [one for one in self._held if one.direction == "up"]
                    self._emit(event)

    def _receive_packet(self, packet: Packet) -> None:
        kind = self._draw("down")
        if kind == "disconnect":
            self._inner.drop("injected fault")
        elif kind in ("reorder", "delay"):
            self._hold(packet, "down", kind)
            return
        elif kind != "lose":
            received = Received(harmed(packet, kind, self._rng))
            self._emit(received)
            if kind == "double":
                self._emit(received)
        self._release_overtaken("down")

    def _draw(self, direction: Direction) -> str:
        if direction not in self._plan.directions:
            return ""
        kind = self._plan.draw(self._rng)
        if kind:
            self.faults[kind] += 1
        return kind

    def _hold(self, packet: Packet, direction: Direction, kind: str) -> None:
        passes = 1 if kind == "reorder" else self._plan.delay_packets
        self._held.append(_Held(packet, direction, passes))

    def _release_overtaken(self, direction: Direction) -> None:
        """A packet has passed: those that waited for it follow."""
        due = []
        for one in self._held:
            if one.direction == direction:
                one.passes_left -= 1
                if one.passes_left <= 0:
                    due.append(one)
        for one in due:
            self._held.remove(one)
            self._let_go(one)

    def _let_go(self, held: _Held) -> None:
        if held.direction == "up":
            self._publish_unasked(held.packet)
        else:
            self._emit(Received(held.packet))

    def _publish_unasked(self, packet: Packet) -> None:
        """A copy or a late packet: when it cannot travel it is lost, and nobody waits for it."""
        try:
            self._inner.publish(packet)
        except (BackpressureError, OversizeError):
            self.faults["lose"] += 1

    def _pay(self) -> None:
        owed, self._owed = self._owed, []
        for event in owed:
            self._emit(event)

    def _emit(self, event: TransportEvent) -> None:
        if self._deliver is not None:
            self._deliver(event)


def harmed(packet: Packet, kind: str, rng: random.Random) -> Packet:
    """A packet of which the end is missing (`truncate`), or one bit is another (`corrupt`); of another kind, itself."""
    payload = packet.payload
    if kind == "truncate" and payload:
        return replace(packet, payload=payload[: rng.randrange(len(payload))])
    if kind == "corrupt" and payload:
        flipped = bytearray(payload)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return replace(packet, payload=bytes(flipped))
    return packet
