"""An MQTT 5 client without manners: it sends what a test tells it to, and believes no limit that a broker names.

Blocking, on the caller's thread, so that a test is a sequence of steps. Written from the OASIS standard, not from the
product: what our transport would never send is the point.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from types import TracebackType

DEADLINE_SECONDS = 20.0
CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, DISCONNECT = 1, 2, 3, 4, 8, 9, 14
NOT_AUTHORISED = 0x87
SESSION_EXPIRY, SERVER_KEEPALIVE, MAXIMUM_QOS, MAXIMUM_PACKET = 0x11, 0x13, 0x24, 0x27
# How many bytes a property of CONNACK takes; 0: a text with its length in front, -1: two of them.
_SIZES = {0x11: 4, 0x12: 0, 0x13: 2, 0x15: 0, 0x16: 0, 0x1A: 0, 0x1C: 0, 0x1F: 0, 0x21: 2, 0x22: 2}
_SIZES |= {0x24: 1, 0x25: 1, 0x26: -1, 0x27: 4, 0x28: 1, 0x29: 1, 0x2A: 1}


class Gone(Exception):
    """The broker ended the connection, or never let us in. `reason` is of its DISCONNECT or CONNACK; 0: no word."""

    def __init__(self, text: str, reason: int = 0) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Message:
    """A publication as it came."""

    topic: str
    payload: bytes
    retain: bool


class RawClient:
    """One connection. A context manager: leaving it cuts the connection without a goodbye.

    Args:
        tls: None for plain TCP.
        will: topic and payload.
        expiry_seconds: of the session.

    Raises:
        Gone: TLS or CONNECT was refused.
    """

    def __init__(
        self,
        port: int,
        tls: ssl.SSLContext | None,
        client_id: str,
        *,
        will: tuple[str, bytes] | None = None,
        user: str = "",
        clean: bool = True,
        expiry_seconds: int = 0,
        keepalive_seconds: int = 60,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self._next_id = 0
        self._buffer = b""
        self.received: list[Message] = []
        plain = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_SECONDS)
        self.socket: socket.socket = plain
        try:
            if tls is not None:
                self.socket = tls.wrap_socket(plain, server_hostname="127.0.0.1", session=session)
            self._send(
                CONNECT << 4, _connect_body(client_id, will, user, clean, expiry_seconds, keepalive_seconds)
            )
            kind, body = self._read()
        except (OSError, Gone) as error:
            plain.close()
            self.close()
            raise Gone(f"refused: {error}") from error
        if kind >> 4 != CONNACK or body[1]:
            self.close()
            raise Gone(f"CONNECT was answered by {kind:02x} {body.hex()}", body[1])
        self.session_present = bool(body[0] & 1)
        self.welcome = _properties(body[2:])

    def subscribe(self, *filters: str) -> list[int]:
        """Returns the reason code of each."""
        packet_id = self._take_id()
        body = packet_id + b"\0" + b"".join(text(name) + b"\x01" for name in filters)
        self._send(SUBSCRIBE << 4 | 2, body)
        return list(self._until(SUBACK, packet_id)[3:])

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> int:
        """Returns the reason code of the acknowledgement; QoS 0 has none."""
        packet_id = self._take_id() if qos else b""
        self._send(PUBLISH << 4 | qos << 1 | retain, text(topic) + packet_id + b"\0" + payload)
        if not qos:
            return 0
        answer = self._until(PUBACK, packet_id)
        return answer[2] if len(answer) > 2 else 0

    def until(self, payload: bytes) -> list[Message]:
        """Reads until this payload came; returns all that came before it."""
        while not any(message.payload == payload for message in self.received):
            self._step()
        place = next(i for i, message in enumerate(self.received) if message.payload == payload)
        before, self.received = self.received[:place], self.received[place + 1 :]
        return before

    def until_gone(self) -> Gone:
        """Reads until the broker ends the connection."""
        try:
            while True:
                self._step()
        except Gone as gone:
            return gone

    def leave(self) -> None:
        """A clean goodbye: no will, and the session lives as long as was agreed."""
        self._send(DISCONNECT << 4, b"")
        self.close()

    def close(self) -> None:
        """Cuts the connection."""
        self.socket.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _until(self, kind: int, packet_id: bytes) -> bytes:
        while True:
            came, body = self._step()
            if came >> 4 == kind and body[:2] == packet_id:
                return body

    def _step(self) -> tuple[int, bytes]:
        """One packet; a publication is kept and acknowledged."""
        kind, body = self._read()
        if kind >> 4 == PUBLISH:
            size = int.from_bytes(body[:2], "big")
            topic, rest = body[2 : 2 + size].decode(), body[2 + size :]
            if kind & 6:
                self._send(PUBACK << 4, rest[:2])
                rest = rest[2:]
            length, used = _varint(rest)
            self.received.append(Message(topic, rest[used + length :], bool(kind & 1)))
        elif kind >> 4 == DISCONNECT:
            self.close()
            raise Gone("the broker said goodbye", body[0] if body else 0)
        return kind, body

    def _send(self, first: int, body: bytes) -> None:
        try:
            self.socket.sendall(bytes([first]) + remaining_length(len(body)) + body)
        except TimeoutError:
            raise
        except OSError as error:
            raise Gone(f"cut while sending: {error}") from error

    def _read(self) -> tuple[int, bytes]:
        while True:
            if len(self._buffer) > 1:
                try:
                    length, used = _varint(self._buffer[1:5])
                except IndexError:
                    length, used = 1 << 30, 0
                end = 1 + used + length
                if len(self._buffer) >= end:
                    packet, self._buffer = self._buffer[:end], self._buffer[end:]
                    return packet[0], packet[1 + used :]
            try:
                more = self.socket.recv(65_536)
            except TimeoutError:
                raise
            except OSError as error:
                raise Gone(f"cut: {error}") from error
            if not more:
                raise Gone("the broker closed the connection")
            self._buffer += more

    def _take_id(self) -> bytes:
        self._next_id += 1
        return self._next_id.to_bytes(2, "big")


def _connect_body(
    client_id: str,
    will: tuple[str, bytes] | None,
    user: str,
    clean: bool,
    expiry_seconds: int,
    keepalive_seconds: int,
) -> bytes:
    flags = (2 if clean else 0) | (0x0C if will else 0) | (0xC0 if user else 0)
    body = text("MQTT") + bytes([5, flags]) + keepalive_seconds.to_bytes(2, "big")
    body += b"\x05" + bytes([SESSION_EXPIRY]) + expiry_seconds.to_bytes(4, "big") + text(client_id)
    if will is not None:
        body += b"\0" + text(will[0]) + len(will[1]).to_bytes(2, "big") + will[1]
    if user:
        body += text(user) + text("password")
    return body


def text(value: str) -> bytes:
    """A text with its length in front."""
    data = value.encode()
    return len(data).to_bytes(2, "big") + data


def remaining_length(size: int) -> bytes:
    """How long a packet is, behind its first byte."""
    parts = bytearray()
    while True:
        size, low = divmod(size, 128)
        parts.append(low | (128 if size else 0))
        if not size:
            return bytes(parts)


def _varint(data: bytes) -> tuple[int, int]:
    """Value, and the bytes that it took."""
    value = shift = used = 0
    while True:
        byte = data[used]
        used += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, used


def _properties(data: bytes) -> dict[int, bytes]:
    length, used = _varint(data)
    rest, found = data[used : used + length], {}
    while rest:
        key, rest = rest[0], rest[1:]
        size = _SIZES[key]
        begin = 0
        for _ in range({0: 1, -1: 2}.get(size, 0)):
            begin += 2 + int.from_bytes(rest[begin : begin + 2], "big")
        end = size if size > 0 else begin
        found[key] = rest[2:end] if size == 0 else rest[:end]
        rest = rest[end:]
    return found
