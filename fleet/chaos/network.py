"""One end of a node's connection, with what networks and brokers do to packets on the way.

Laws of the file: a fault strikes one packet; what is lost is acknowledged all the same, because that is what a broker
with a full queue does; nothing passes after the node that it belongs to has died. Times are virtual.

`wire.transport.faulty` is another thing: it draws a fault for each packet by chance, knows no time and no node, and
goes before any transport. Here a schedule says which packet, what is late comes when virtual time says so, and a node
may die of it; what the two do to the bytes of a packet is one function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from fleet.chaos.disk import Disk
from fleet.chaos.faults import Fault
from wire import envelope
from wire.errors import BackpressureError, EnvelopeError, OversizeError
from wire.messages import MaskInbox, MaskKeys, MaskOpened, MaskQuestion, MaskRoster, MaskShares
from wire.transport import Connected, Deliver, Disconnected, Packet, Published, Received, TransportEvent
from wire.transport.faulty import harmed
from wire.transport.memory import MemoryTransport

_OF_MASKS = frozenset(
    each.TYPE for each in (MaskKeys, MaskShares, MaskOpened, MaskRoster, MaskInbox, MaskQuestion)
)
Later = Callable[[float, Callable[[], None]], None]
LATEST_SECONDS = 45.0
CUT_SECONDS = 8.0
OVERTAKEN_SECONDS = 2.0
"""A packet that waits to be overtaken does not wait longer for another."""


@dataclass(frozen=True, slots=True)
class Names:
    """What the points of one end are called: `device.publish`, `up`, `down` for a device."""

    publish: str
    away: str
    here: str


DEVICE = Names("device.publish", "up", "down")
CLOUD = Names("cloud.publish", "", "in")


class ChaosTransport:
    """Behind the same seam as the transport that it harms.

    Args:
        inner: carries what survives.
        disk: of the node, which dies where a fault says so.
        later: plans a call, in virtual seconds.
        sent: told of every packet that leaves the node, before anything harms it.
    """

    def __init__(
        self,
        inner: MemoryTransport,
        disk: Disk,
        later: Later,
        names: Names,
        sent: Callable[[Packet], None] = lambda packet: None,
    ) -> None:
        self._inner = inner
        self._disk = disk
        self._later = later
        self._names = names
        self._sent = sent
        self._deliver: Deliver | None = None
        self._is_connected = False
        self._life = disk.life
        self._overtaken: list[Callable[[], None]] = []
        self._tokens = 0

    def start(
        self, deliver: Deliver, *, filters: Sequence[tuple[str, int]], will: Packet | None = None
    ) -> None:
        self._deliver = deliver
        self._inner.start(self._receive, filters=filters, will=will)

    def publish(self, packet: Packet) -> int:
        self._disk.check_alive()
        if not self._is_connected:
            return self._inner.publish(packet)  # which says why not
        kind = sort_of(packet)
        fault = self._disk.pass_by(f"{self._names.publish}.{kind}")
        if fault is not None and fault.kind == "crash_before":
            self._disk.crash(fault)
        away = self._names.away
        token = self._carry(packet, self._disk.pass_by(f"{away}.{kind}") if away else None)
        if fault is not None:
            self._disk.crash(fault)
        return token

    def stop(self, last_words: Packet | None = None) -> None:
        self._inner.stop(last_words)

    def drop(self, reason: str = "dropped on purpose", *, for_seconds: float = 0.0) -> None:
        """Cuts the connection."""
        self._inner.drop(reason, for_seconds=for_seconds)

    # ---- up ----------------------------------------------------------------------------------------------------

    def _carry(self, packet: Packet, fault: Fault | None) -> int:
        overtaken, self._overtaken = self._overtaken, []
        token = self._carry_one(packet, fault)
        for call in overtaken:
            call()
        return token

    def _carry_one(self, packet: Packet, fault: Fault | None) -> int:
        if fault is None:
            token = self._inner.publish(packet)
            self._sent(packet)
            return token
        self._sent(packet)
        rng = fault.rng()
        if fault.kind == "double":
            self._inner.publish(packet)
            return self._inner.publish(packet)
        if fault.kind in ("truncate", "corrupt"):
            return self._inner.publish(harmed(packet, fault.kind, rng))
        if fault.kind == "cut":
            self._inner.drop("cut by a fault", for_seconds=rng.uniform(0.0, CUT_SECONDS))
        if fault.kind == "late":
            self._later(rng.uniform(0.1, LATEST_SECONDS), lambda: self._publish_late(packet))
        if fault.kind == "reorder":
            self._wait_for_another(lambda: self._publish_late(packet))
        self._tokens -= 1
        token = self._tokens
        self._later(0.0, lambda: self._emit(Published(token, accepted=True)))
        return token

    def _publish_late(self, packet: Packet) -> None:
        with suppress(BackpressureError, OversizeError):
            if self._disk.is_of(self._life):
                self._inner.publish(packet)

    # ---- down --------------------------------------------------------------------------------------------------

    def _receive(self, event: TransportEvent) -> None:
        match event:
            case Connected():
                self._is_connected = True
            case Disconnected():
                self._is_connected = False
            case Received(packet):
                if self._disk.is_of(self._life):
                    self._take(packet)
                return
        self._emit(event)

    def _take(self, packet: Packet) -> None:
        fault = self._disk.pass_by(f"{self._names.here}.{sort_of(packet)}")
        overtaken, self._overtaken = self._overtaken, []
        self._take_one(packet, fault)
        for call in overtaken:
            call()

    def _take_one(self, packet: Packet, fault: Fault | None) -> None:
        if fault is None:
            self._emit(Received(packet))
            return
        rng = fault.rng()
        if fault.kind == "double":
            self._emit(Received(packet))
            self._emit(Received(packet))
        elif fault.kind in ("truncate", "corrupt"):
            self._emit(Received(harmed(packet, fault.kind, rng)))
        elif fault.kind == "cut":
            self._inner.drop("cut by a fault", for_seconds=rng.uniform(0.0, CUT_SECONDS))
        elif fault.kind == "late":
            self._later(rng.uniform(0.1, LATEST_SECONDS), lambda: self._emit(Received(packet)))
        elif fault.kind == "reorder":
            self._wait_for_another(lambda: self._emit(Received(packet)))

    def _wait_for_another(self, call: Callable[[], None]) -> None:
        """Once: by the packet that overtakes it, or by time."""
        is_done = False

        def once() -> None:
            nonlocal is_done
            if not is_done:
                is_done = True
                call()

        self._overtaken.append(once)
        self._later(OVERTAKEN_SECONDS, once)

    def _emit(self, event: TransportEvent) -> None:
        if self._deliver is not None and self._disk.is_of(self._life):
            self._deliver(event)


def kind_of(packet: Packet) -> str:
    """What a packet is, by its topic: `up`, `ak`, …"""
    return packet.topic.split("/", 5)[4]


def sort_of(packet: Packet) -> str:
    """What a packet is, for the name of a point: its kind, or `mask` for a message of a masked round, which travels
    with answers and orders."""
    kind = kind_of(packet)
    if kind not in ("jn", "cm"):
        return kind
    with suppress(EnvelopeError):
        return "mask" if envelope.peek(packet.payload).type in _OF_MASKS else kind
    return kind
