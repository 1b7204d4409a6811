"""Runs an ASGI application over TLS 1.3 on a thread of its own (uvicorn), with or without client
certificates.

Laws of the file: the socket is bound before `start` returns, so that a port that is taken is an error to the
caller; no signal handler is touched; whom a client certificate names reaches the application as `Peer` in the
scope, and nothing that a client sends can put it there.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from pathlib import Path
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from cloud_server.api import PEER, Peer, device_app, public_app
from cloud_server.db.releases import is_checkpoint
from cloud_server.deployment import Deployment
from cloud_server.enrolment.limits import RateLimit
from process.pulse import Pulse
from wire.errors import ConfigurationError, ShoalError, TransportError

_START_SECONDS: Final = 30.0
# For requests under way; with the rest of a stop less than the ten seconds that a service manager waits.
_STOP_SECONDS: Final = 3
_MAX_CONNECTIONS: Final = 1024
_MAX_HEADER_BYTES: Final = 16_384
_FIRST_REQUEST_SECONDS: Final = 20.0


def tls_context(certificate: Path, key: Path, client_ca: str | None = None) -> ssl.SSLContext:
    """A server's context: TLS 1.3 only, and with `client_ca` (PEM) a client certificate of that CA is
    required.

    Raises:
        ConfigurationError: (operator) the files are not a certificate and its key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # A ticket would let a client in again without a look at its certificate.
    context.num_tickets = 0
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(certificate, key)
        if client_ca is not None:
            context.load_verify_locations(cadata=client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            context.verify_flags |= ssl.VERIFY_X509_STRICT
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ConfigurationError(f"{certificate} cannot be used for HTTPS", hint="restore ca/") from error
    return context


class HttpsServer:
    """One port. It is bound when this is made, so that its number can be told before it answers.

    Args:
        port: 0 takes a free one; `port` tells which.

    Raises:
        TransportError: (operator) the address cannot be listened on.
    """

    def __init__(self, context: ssl.SSLContext, *, host: str, port: int) -> None:
        self._context = self._present = context
        context.sni_callback = self._choose
        self._listener = _bind(host, port)
        self.port: int = self._listener.getsockname()[1]
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def use(self, context: ssl.SSLContext) -> None:
        """Shows and trusts what this context does, from the next connection on. From any thread."""
        self._present = context

    def _choose(self, connection: Any, _name: str | None, _context: ssl.SSLContext) -> None:
        """Called in every handshake, whether or not the client says a name."""
        connection.context = self._present

    def start(self, app: FastAPI) -> None:
        """Answers from now on.

        Raises:
            TransportError: the server did not come up.
        """
        config = uvicorn.Config(
            app,
            http=_DeviceProtocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MAX_CONNECTIONS,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            timeout_graceful_shutdown=_STOP_SECONDS,
            ssl_context_factory=lambda _config, _default: self._context,
        )
        server = self._server = _Server(config)
        self._thread = threading.Thread(
            target=lambda: server.run([self._listener]), name=f"https-{self.port}", daemon=True
        )
        self._thread.start()
        if not server.is_up.wait(_START_SECONDS):
            raise TransportError(f"HTTPS on port {self.port} did not start")

    def begin_stop(self) -> None:
        """Takes no further connection; several servers that shall end together wait for their requests at once."""
        if self._server is not None:
            self._server.should_exit = True

    def stop(self) -> None:
        """Ends the requests under way (some seconds at most), the thread and the port. Safe to call twice."""
        self.begin_stop()
        if self._thread is not None:
            self._thread.join()
            self._server = self._thread = None
        self._listener.close()


class HttpsFront:
    """Both ports of one deployment, answering until `stop`. A context manager.

    Args:
        broker_url: what enrolled devices are told.
        pulse: whether the service lives, for `/healthz` and `/readyz`.

    Attributes:
        enrolment: what answers on both.

    Raises:
        TransportError: (operator) a port cannot be listened on.
    """

    def __init__(self, deployment: Deployment, *, broker_url: str, pulse: Pulse | None = None) -> None:
        self._deployment = deployment
        self._authorities = deployment.authorities
        public, device = _contexts(deployment)
        listen = deployment.settings.listen
        self._public = HttpsServer(public, host=listen.host, port=listen.public_port)
        try:
            self._device = HttpsServer(device, host=listen.host, port=listen.device_port)
        except ShoalError:
            self._public.stop()
            raise
        self.public_port, self.device_port = self._public.port, self._device.port
        enrolment = self.enrolment = deployment.enrolment(
            deployment.welcome(device_port=self.device_port, broker_url=broker_url)
        )
        bounds = deployment.settings.enrolment
        limit = RateLimit(deployment.clock, per_address=bounds.address_per_minute, overall=bounds.per_minute)

        def is_served_blob(sha256: str) -> bool:
            with deployment.database.read() as connection:
                return is_checkpoint(connection, sha256)

        self._device.start(
            device_app(enrolment, deployment.registry, deployment.artefacts, is_served_blob=is_served_blob)
        )
        self._public.start(public_app(enrolment, limit, deployment.artefacts, pulse))

    def follow(self) -> None:
        """Shows and trusts the authorities of now; cheap when nothing changed.

        Raises:
            ConfigurationError: (operator) the authority's files cannot be used.
            StorageError: (disk) nor read.
        """
        if self._deployment.authorities is not self._authorities:
            self.show_anew()

    def show_anew(self) -> None:
        """Shows a certificate of today (made anew near its end) from the next connection on; raises as `follow`."""
        present = self._deployment.authorities
        public, device = _contexts(self._deployment)
        self._public.use(public)
        self._device.use(device)
        self._authorities = present

    def begin_stop(self) -> None:
        """See `HttpsServer.begin_stop`."""
        self._public.begin_stop()
        self._device.begin_stop()

    def stop(self) -> None:
        """Stops both ports. Safe to call twice."""
        self.begin_stop()
        self._public.stop()
        self._device.stop()

    def __enter__(self) -> HttpsFront:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _contexts(deployment: Deployment) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of the public port and of the devices'."""
    certificate, key = deployment.server_files()
    trusted = deployment.authorities.bundle_pem
    return tls_context(certificate, key), tls_context(certificate, key, trusted)


class _Server(uvicorn.Server):
    """uvicorn's server that tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.is_up.set()


class _DeviceProtocol(H11Protocol):
    """HTTP/1.1 that tells the application whom the client certificate names, which ASGI servers do not.

    Who connects and asks for nothing is let go: there are only so many connections for all.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = _peer(transport.get_extra_info("ssl_object"))
        inner = self.app

        async def with_peer(scope: Any, receive: Any, send: Any) -> None:
            await inner({**scope, PEER: peer}, receive, send)

        self.app = with_peer
        self.loop.call_later(_FIRST_REQUEST_SECONDS, self._let_go)

    def _let_go(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def _peer(connection: ssl.SSLObject | None) -> Peer | None:
    """The verified certificate's name; None without one (a port that does not ask for any)."""
    certificate = connection.getpeercert() if connection is not None else None
    if not certificate:
        return None
    fields: dict[str, Any] = dict(certificate)
    names = [value for part in fields["subject"] for name, value in part if name == "commonName"]
    return Peer(names[0], f"{int(fields['serialNumber'], 16):x}") if len(names) == 1 else None


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # asyncio switches Nagle's algorithm off for sockets that say they are TCP's: with it the second part of
        # every answer waits 40 ms for the client to acknowledge the first.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        raise TransportError(
            f"cannot listen on {host}:{port}: {error}",
            hint="another program has the port, or the host is not ours",
        ) from error
    return listener
