"""TLS to the aggregator: contexts that trust exactly one CA, and connections that verify the name we expect.

Laws of the file: the machine's certificate store and its proxy settings are never asked; a connection is
verified against the pinned CA and the server's TLS name, whatever address it goes to; every call has a
time-out and a byte limit. The one exception, `unverified_context`, may fetch only what is checked by its
hash, or by TUF.
"""

from __future__ import annotations

import email.utils
import http.client
import math
import socket
import ssl
import time
from pathlib import Path
from typing import Any, Final

from edge_agent.enrolment.identity import Identity, parse_https_url
from wire.errors import PeerError, TransportError, TrustError
from wire.traffic import TrafficMeter

BUSY: Final = frozenset({429, 502, 503, 504})
"""A server that may answer later."""
TIMEOUT_SECONDS: Final = 30.0
USER_AGENT: Final = "shoal-edge"
METER: Final = TrafficMeter()
"""Of all HTTPS connections of this process, which is a release check or an enrolment and ends with it."""


class _CountedSocket(ssl.SSLSocket):
    """Takes its last reading when it is closed: by the connection, by the response, or by whoever comes last."""

    def close(self) -> None:
        METER.read(self)
        super().close()


def verified_context(
    ca_pem: bytes, *, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """A client context that trusts one CA, optionally with our own certificate (mutual TLS).

    Raises:
        TrustError: the CA, certificate or key cannot be used.
    """
    context = _context()
    try:
        context.load_verify_locations(cadata=ca_pem.decode("ascii"))
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise TrustError(f"a certificate or key cannot be used for TLS: {error}") from error
    return context


def identity_context(identity: Identity) -> ssl.SSLContext:
    """Mutual TLS as one device; raises like `verified_context`."""
    return verified_context(identity.ca_pem, certificate=identity.certificate_path, key=identity.tls_key_path)


def unverified_context() -> ssl.SSLContext:
    """Checks nothing. Only for bytes that need no trust in who gives them: the CA certificate named by a token, and
    signed metadata."""
    context = _context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.sslsocket_class = _CountedSocket
    return context


class HttpsConnection(http.client.HTTPSConnection):
    """A connection to `url` that expects the certificate of `tls_name`, which need not be the URL's host.

    Attributes:
        asked_seconds: how long its last answer asked to be left alone (`Retry-After`).
    """

    def __init__(
        self, url: str, *, tls_name: str, context: ssl.SSLContext, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        host, port = parse_https_url(url)
        super().__init__(host, port, timeout=timeout_seconds, context=context)
        self.url = url
        self.asked_seconds = 0.0
        self._tls_name = tls_name
        self._tls = context

    def connect(self) -> None:
        """Raises `TransportError` (no way there) or `TrustError` (not the server that we expect)."""
        try:
            plain = socket.create_connection((self.host, self.port), self.timeout)
        except OSError as error:
            raise TransportError(
                f"cannot connect to {self.url}: {error.strerror or error}",
                hint="is the aggregator running, and reachable from here?",
            ) from error
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.sock = self._tls.wrap_socket(
                plain, server_hostname=self._tls_name, do_handshake_on_connect=False
            )
            METER.watch(self.sock)
            self.sock.do_handshake()
        except ssl.SSLCertVerificationError as error:
            self._drop(plain)
            raise TrustError(
                f"{self.url} does not show the certificate that we expect: {error.verify_message}",
                hint="wrong address, wrong clock, or somebody in between",
            ) from error
        except (OSError, ValueError) as error:
            self._drop(plain)
            raise TransportError(f"no TLS with {self.url}: {error}") from error

    def _drop(self, plain: socket.socket) -> None:
        plain.close()
        self.close()

    def send(self, data: Any) -> None:
        """In TLS 1.3 a server judges our certificate when our handshake is over already: it may have said why and be
        gone before we write, and then the reason is what we raise."""
        try:
            super().send(data)
        except OSError:
            self._raise_alert()
            raise

    def _raise_alert(self) -> None:
        try:
            self.sock.recv(1)
        except ssl.SSLError as alert:
            if alert.reason:
                raise
        except OSError:
            return


def retry_after_seconds(text: str, now: float) -> float:
    """What a `Retry-After` asks for (RFC 9110 §10.2.3: seconds, or a date); 0 where it asks for nothing that can be
    read. Whoever waits bounds it (`wire/backoff.py`).

    Args:
        now: unix seconds, for a date.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        wanted = email.utils.parsedate_to_datetime(text).timestamp() - now
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return max(0.0, wanted) if math.isfinite(wanted) else 0.0


def exchange(
    connection: HttpsConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    limit_bytes: int,
) -> tuple[int, bytes]:
    """One request and its whole answer: (status, body).

    Raises:
        TransportError: the connection failed or timed out.
        TrustError: another server than expected.
        PeerError: the answer is longer than `limit_bytes`.
    """
    headers = {"User-Agent": USER_AGENT}
    if body is not None:
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        data = response.read(limit_bytes + 1)
        left = response.length
        asked = response.getheader("Retry-After", "")
    except (OSError, http.client.HTTPException) as error:
        raise TransportError(
            f"{method} {connection.url}{path} failed: {error or type(error).__name__}"
        ) from error
    finally:
        connection.close()
    connection.asked_seconds = retry_after_seconds(asked, time.time())
    if len(data) > limit_bytes:
        raise PeerError(f"the answer of {connection.url}{path} is too long", limit_bytes=limit_bytes)
    if left:
        raise TransportError(f"the answer of {connection.url}{path} ended {left} bytes early")
    return response.status, data
