"""How one process that may be killed at any system call talks with the world that it plays in: frames over a socket.

Laws of the file: one frame, one system call; what a node publishes leaves by `sendto`, which is a part of its path and
may be struck, everything that serves the play alone by `sendmsg`, which is not; the world answers `Fetch` at once and
everything else in its own time, so that a path has the same system calls in the same order every time it is played.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from wire.errors import BackpressureError, TransportError
from wire.transport import Connected, Deliver, Disconnected, Packet, Published, Received, TransportEvent
from wire.transport.gate import check_room
from wire.transport.topic_filters import check_packet

MAX_FRAME_BYTES: Final = 1_048_576


# ---- what the world says ------------------------------------------------------------------------------------


class Begin(Struct, frozen=True, tag=True):
    """The first frame: what to open.

    Attributes:
        role: `device` or `cloud`.
        now: unix seconds of virtual time.
        life: counts from 1 in a play.
        facts: what the role needs beside that.
    """

    role: str
    folder: str
    now: float
    life: int
    facts: dict[str, Any] = {}


class Heard(Struct, frozen=True, tag=True):
    """An event of the transport."""

    kind: str
    packet: tuple[str, bytes, int, bool, int | None] | None = None
    reason: str = ""
    token: int = 0
    limits: tuple[bool, int, int] = (False, 0, 0)

    @classmethod
    def of(cls, event: TransportEvent) -> Heard:
        match event:
            case Received(packet):
                return cls("received", packet=plain(packet))
            case Published(token, accepted, reason):
                return cls("published" if accepted else "rejected", reason=reason, token=token)
            case Connected(present, packet_bytes, maximum):
                return cls("connected", limits=(present, packet_bytes, maximum))
            case Disconnected(reason):
                return cls("disconnected", reason=reason)

    def event(self) -> TransportEvent:
        if self.packet is not None:
            return Received(Packet(*self.packet))
        if self.kind == "connected":
            return Connected(*self.limits)
        if self.kind == "disconnected":
            return Disconnected(self.reason)
        return Published(self.token, self.kind == "published", self.reason)


class Turn(Struct, frozen=True, tag=True):
    """Do what is due; the time is `now`."""

    now: float


class File(Struct, frozen=True, tag=True):
    """What a fetch found."""

    data: bytes | None


class Leave(Struct, frozen=True, tag=True):
    """Stop politely."""


# ---- what a node says ---------------------------------------------------------------------------------------


class Ready(Struct, frozen=True, tag=True):
    """The process is there and has opened nothing."""


class Listen(Struct, frozen=True, tag=True):
    """It connects to the broker."""

    filters: tuple[tuple[str, int], ...]
    will: tuple[str, bytes, int, bool, int | None] | None = None


class Publish(Struct, frozen=True, tag=True):
    """A publication."""

    token: int
    packet: tuple[str, bytes, int, bool, int | None]


class Fetch(Struct, frozen=True, tag=True):
    """It asks for a file of the signed repository."""

    path: str


class Note(Struct, frozen=True, tag=True):
    """Something for the books, before it is committed anywhere."""

    what: str
    values: tuple[str, ...]


class Rest(Struct, frozen=True, tag=True):
    """Its turn is over.

    Attributes:
        wake: unix seconds when it wants the next one.
        facts: how it is.
    """

    wake: float
    facts: dict[str, Any] = {}


class Ended(Struct, frozen=True, tag=True):
    """It ends by itself, and why."""

    reason: str


Down = Begin | Heard | Turn | File | Leave
Up = Ready | Listen | Publish | Fetch | Note | Rest | Ended
_DOWN = msgspec.msgpack.Decoder(Down)
_UP = msgspec.msgpack.Decoder(Up)
_encode = msgspec.msgpack.Encoder().encode


def plain(packet: Packet) -> tuple[str, bytes, int, bool, int | None]:
    """A packet as a frame has it."""
    return packet.topic, packet.payload, packet.qos, packet.retain, packet.expiry_seconds


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a new link."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_FRAME_BYTES)
    return ends


class WorldEnd:
    """The world's end of a link."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, frame: Down) -> bool:
        """False when nobody is there any more."""
        try:
            self._end.sendmsg([_encode(frame)])
        except OSError:
            return False
        return True

    def receive(self) -> Up | None:
        """The next frame; None when the process is gone."""
        try:
            data = self._end.recv(MAX_FRAME_BYTES)
        except OSError:
            return None
        return _UP.decode(data) if data else None

    def close(self) -> None:
        self._end.close()


class NodeEnd:
    """The node's end of a link."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, frame: Up) -> None:
        self._end.sendmsg([_encode(frame)])

    def publish(self, frame: Publish) -> None:
        """Raises `TransportError` when it does not leave."""
        try:
            self._end.send(_encode(frame))
        except OSError as error:
            raise TransportError(f"the publication did not leave: {error.strerror}") from error

    def receive(self) -> Down | None:
        """The next frame; None when the world has ended."""
        data = self._end.recv(MAX_FRAME_BYTES)
        return _DOWN.decode(data) if data else None

    def fetch(self, path: str) -> bytes | None:
        """A file of the signed repository."""
        self.send(Fetch(path))
        answer = self.receive()
        if not isinstance(answer, File):
            raise TransportError(f"{path} was asked for, and {type(answer).__name__} came")
        return answer.data


class LinkTransport:
    """A `wire.transport.Transport` over a link."""

    def __init__(self, end: NodeEnd) -> None:
        self._end = end
        self._deliver: Deliver = lambda event: None
        self._limit_bytes = 0
        self._last_token = 0

    def start(
        self, deliver: Deliver, *, filters: Sequence[tuple[str, int]], will: Packet | None = None
    ) -> None:
        self._deliver = deliver
        self._end.send(Listen(tuple(filters), plain(will) if will is not None else None))

    def publish(self, packet: Packet) -> int:
        check_packet(packet)
        if not self._limit_bytes:
            raise BackpressureError("there is no connection")
        check_room(packet, self._limit_bytes)
        self._last_token += 1
        try:
            self._end.publish(Publish(self._last_token, plain(packet)))
        except TransportError as error:
            # As a real transport: it has the packet, and what becomes of it is told later.
            self._deliver(Published(self._last_token, accepted=False, reason=str(error)))
        return self._last_token

    def stop(self, last_words: Packet | None = None) -> None:
        if last_words is not None and self._limit_bytes:
            self.publish(last_words)

    def take(self, event: TransportEvent) -> None:
        """Hands an event over."""
        match event:
            case Connected():
                self._limit_bytes = event.max_packet_bytes
            case Disconnected():
                self._limit_bytes = 0
        self._deliver(event)


Send = Callable[[Up], None]
