"""Opening a connection without blocking the selector loop: resolve, connect, TLS handshake, one deadline for
all.

paho's own connect blocks for up to five seconds, which would stop every other client of the loop.
`BoundedSocket` is what paho is then given: it reads in large pieces (paho asks for single bytes) and refuses
a packet above our limit before anything of that size is allocated.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import ssl
import threading
from collections.abc import Callable

from wire.traffic import TrafficMeter
from wire.transport import REFUSED_IN_TLS, UNTRUSTED
from wire.transport.selector import SelectorLoop

CONNECT_TIMEOUT_SECONDS = 15.0  # for name resolution, TCP and TLS together
_READ_BYTES = 65_536
_IN_PROGRESS = frozenset({0, errno.EINPROGRESS, errno.EWOULDBLOCK})

Address = tuple[int, tuple[object, ...]]
Done = Callable[["BoundedSocket | None", str], None]


class BoundedSocket:
    """A connected socket with a read buffer and a cap on the size of one read.

    Args:
        connected: a non-blocking, connected socket (TLS done, where used).
        max_read_bytes: the largest single read that is allowed: paho asks for the whole rest of a packet at
            once.
        meter: counts what the connection costs.
    """

    def __init__(
        self, connected: socket.socket, max_read_bytes: int, meter: TrafficMeter | None = None
    ) -> None:
        self._meter = meter
        self._socket = connected
        self._max_read_bytes = max_read_bytes
        self._buffer = b""
        self._position = 0
        self.fault = ""

    def recv(self, size: int) -> bytes:
        """Up to `size` bytes; raises as a socket does.

        Raises:
            ConnectionError: (peer) a packet above the limit.
        """
        if size > self._max_read_bytes:
            self.fault = (
                f"the broker sent a packet of {size} bytes, above our limit of {self._max_read_bytes}"
            )
            raise ConnectionError(self.fault)
        if self._position >= len(self._buffer):
            try:
                self._buffer = self._socket.recv(_READ_BYTES)
            except OSError as error:
                self._note(error)
                raise
            self._position = 0
        data = self._buffer[self._position : self._position + size]
        self._position += len(data)
        return data

    def send(self, data: bytes | bytearray) -> int:
        """Sends what fits and returns how much; raises as a socket does."""
        try:
            return self._socket.send(data)
        except OSError as error:
            self._note(self._alert() or error)
            raise

    def pending(self) -> int:
        """Bytes that can be read although the selector would not wake for them."""
        hidden = self._socket.pending() if isinstance(self._socket, ssl.SSLSocket) else 0
        return len(self._buffer) - self._position + hidden

    def close(self) -> None:
        if self._meter is not None:
            self._meter.read(self._socket)
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def setblocking(self, flag: bool) -> None:
        self._socket.setblocking(flag)

    def _alert(self) -> ssl.SSLError | None:
        """What the other side said before it closed: in TLS 1.3 a client certificate is refused when the client
        believes the handshake done, and its first write fails before anybody has read why.
        """
        if isinstance(self._socket, ssl.SSLSocket):
            try:
                self._socket.recv(1)
            except ssl.SSLError as error:
                return error if error.reason and "ALERT" in error.reason else None
            except OSError:
                return None
        return None

    def _note(self, error: OSError) -> None:
        # Kept because paho turns every error into "connection lost".
        if not isinstance(error, (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)):
            self.fault = describe(error)


class Dial:
    """One attempt to connect. Calls `done(socket, "")` or `done(None, reason)` once, on the loop's thread."""

    def __init__(
        self,
        loop: SelectorLoop,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
        *,
        max_read_bytes: int,
        done: Done,
        meter: TrafficMeter,
    ) -> None:
        self._loop = loop
        self._meter = meter
        self._host = host
        # For a text, the resolver loads the code of international names (0.4 MiB).
        self._asked: str | bytes = host.encode("ascii") if host.isascii() else host
        self._port = port
        self._tls = tls
        self._max_read_bytes = max_read_bytes
        self._done: Done | None = done
        self._socket: socket.socket | None = None
        self._addresses: list[Address] = []
        self._last_reason = "the host has no address"
        self._deadline = loop.call_later(
            CONNECT_TIMEOUT_SECONDS, lambda: self._finish(None, "timed out while connecting")
        )
        self._resolve()

    def cancel(self) -> None:
        """Gives up without a call of `done`. Loop's thread only."""
        self._done = None
        self._finish(None, "")

    def _resolve(self) -> None:
        try:  # an address needs no resolver
            found = socket.getaddrinfo(
                self._asked, self._port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
        except socket.gaierror:
            # The resolver blocks for seconds when there is no network, so it gets a thread of its own.
            threading.Thread(target=self._resolve_name, name="shoal-resolve", daemon=True).start()
            return
        self._resolved([(family, address) for family, _, _, _, address in found], "")

    def _resolve_name(self) -> None:
        addresses: list[Address] = []
        reason = ""
        try:
            found = socket.getaddrinfo(self._asked, self._port, type=socket.SOCK_STREAM)
            addresses = [(family, address) for family, _, _, _, address in found]
        except OSError as error:
            reason = describe(error)
        self._loop.call_soon(lambda: self._resolved(addresses, reason))

    def _resolved(self, addresses: list[Address], reason: str) -> None:
        if self._done is None:
            return
        self._addresses = addresses
        self._last_reason = reason or self._last_reason
        self._try_next()

    def _try_next(self) -> None:
        while self._addresses:
            family, address = self._addresses.pop(0)
            try:
                attempt = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:
                self._last_reason = describe(error)
                continue
            attempt.setblocking(False)
            code = attempt.connect_ex(address)
            if code in _IN_PROGRESS:
                self._socket = attempt
                self._loop.register(attempt, selectors.EVENT_WRITE, self._connected)
                return
            attempt.close()
            self._last_reason = os.strerror(code)
        self._finish(None, self._last_reason)

    def _connected(self, _events: int) -> None:
        attempt = self._socket
        if attempt is None:
            return
        self._loop.unregister(attempt)
        code = attempt.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            attempt.close()
            self._socket = None
            self._last_reason = os.strerror(code)
            self._try_next()
            return
        attempt.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is None:
            self._meter.watch(attempt)
            self._succeed()
            return
        try:
            self._socket = self._tls.wrap_socket(
                attempt, server_hostname=self._host, do_handshake_on_connect=False
            )
        except (OSError, ValueError) as error:
            self._finish(None, describe(error))
            return
        self._meter.watch(self._socket)
        self._loop.register(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self._shake)

    def _shake(self, _events: int) -> None:
        secured = self._socket
        if not isinstance(secured, ssl.SSLSocket):
            return
        try:
            secured.do_handshake()
        except ssl.SSLWantReadError:
            self._loop.modify(secured, selectors.EVENT_READ, self._shake)
        except ssl.SSLWantWriteError:
            self._loop.modify(secured, selectors.EVENT_WRITE, self._shake)
        except OSError as error:
            self._finish(None, describe(error))
        else:
            self._loop.unregister(secured)
            self._succeed()

    def _succeed(self) -> None:
        connected, self._socket = self._socket, None
        if connected is not None:
            self._finish(BoundedSocket(connected, self._max_read_bytes, self._meter), "")

    def _finish(self, connected: BoundedSocket | None, reason: str) -> None:
        self._deadline.cancel()
        if self._socket is not None:
            self._loop.unregister(self._socket)
            self._meter.read(self._socket)
            self._socket.close()
            self._socket = None
        done, self._done = self._done, None
        if done is not None:
            done(connected, reason)


def describe(error: OSError | ValueError) -> str:
    """One line about a socket error, without its number."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{UNTRUSTED}: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "the other side closed the TLS connection"
    if isinstance(error, ssl.SSLError) and error.reason and "_ALERT_" in error.reason:
        alert = error.reason.partition("_ALERT_")[2].lower().replace("_", " ")
        return f"{REFUSED_IN_TLS}: {alert}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
