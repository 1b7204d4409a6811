"""What connections really cost a link: bytes as the kernel counts them, TLS, TCP and IP included.

`TCP_INFO` of a connected socket tells payload bytes (of TCP: TLS records and handshakes are in them), what was sent
again, and segments; each segment costs its headers. Laws of the file: it reads and never changes a socket; what cannot
be read (another system than Linux) is None, and nobody takes that for nothing. Look-ups of names are not in it. Source:
tcp(7); linux/tcp.h, `struct tcp_info`.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Final

IPV4_HEADERS_BYTES: Final = 20 + 32
IPV6_HEADERS_BYTES: Final = 40 + 32
"""IP and TCP with timestamps, a segment."""
_CLOSING_SEGMENTS: Final = 2
"""Each way, when a connection ends: a FIN and the acknowledgement of the other's; nobody can ask for them any more."""
_INFO_BYTES: Final = 256
_RECEIVED: Final = struct.Struct("=QII")
_RECEIVED_AT: Final = 128  # bytes_received, segs_out, segs_in
_SENT: Final = struct.Struct("=Q")
_SENT_AT: Final = 200  # bytes_sent, what was sent again included (Linux 4.19)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes on the link."""

    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.sent_bytes + self.received_bytes

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent_bytes + other.sent_bytes, self.received_bytes + other.received_bytes)


def traffic_of(connected: socket.socket) -> Traffic | None:
    """What a connected TCP socket has cost so far; None where the system does not say."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None or connected.fileno() < 0:
        return None
    try:
        info = connected.getsockopt(socket.IPPROTO_TCP, option, _INFO_BYTES)
    except OSError:
        return None
    if len(info) < _SENT_AT + _SENT.size:
        return None
    received, segments_out, segments_in = _RECEIVED.unpack_from(info, _RECEIVED_AT)
    (sent,) = _SENT.unpack_from(info, _SENT_AT)
    headers = IPV6_HEADERS_BYTES if connected.family == socket.AF_INET6 else IPV4_HEADERS_BYTES
    return Traffic(sent + headers * segments_out, received + headers * segments_in)


class TrafficMeter:
    """The sum over many connections, those that ended included. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = Traffic()
        self._watched: dict[socket.socket, Traffic] = {}
        self._is_blind = False

    def watch(self, connected: socket.socket) -> None:
        """Counts a connection from its beginning on; call `read` right before it is closed."""
        with self._lock:
            self._watched[connected] = Traffic()
            self._read(connected)

    def read(self, connected: socket.socket) -> None:
        """Takes the newest reading of a connection, which may be about to be closed."""
        with self._lock:
            if connected in self._watched:
                self._read(connected)

    def total(self) -> Traffic | None:
        """What all of them cost so far; None where the system does not say."""
        with self._lock:
            for connected in list(self._watched):
                self._read(connected)
                if connected.fileno() < 0:
                    closing = _CLOSING_SEGMENTS * IPV4_HEADERS_BYTES
                    self._ended += self._watched.pop(connected) + Traffic(closing, closing)
            return None if self._is_blind else sum(self._watched.values(), self._ended)

    def _read(self, connected: socket.socket) -> None:
        if connected.fileno() < 0:
            return
        found = traffic_of(connected)
        if found is not None:
            self._watched[connected] = found
            return
        # A socket that was shut at this moment says nothing, and has told before; one that never does is blind.
        with contextlib.suppress(OSError):
            connected.getpeername()
            self._is_blind = True
