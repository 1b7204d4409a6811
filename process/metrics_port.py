"""A port that answers `GET /metrics`, for Prometheus and for curl, and `/healthz` and `/readyz`, for whoever restarts
us; nothing else is served and nothing is asked.

Laws of the file: plain HTTP without a password, so it listens where the operator said and nowhere by default; requests
are answered one by one with a time limit for each, so that a slow reader costs no more than the next reading; what it
shows are numbers of the whole process (labels are closed sets: no device, no person, no path).
"""

from __future__ import annotations

import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Final

from process.metrics import CONTENT_TYPE, Registry
from process.pulse import Pulse
from wire.errors import ConfigurationError, TransportError

REQUEST_SECONDS: Final = 5.0


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`.

    Raises:
        ConfigurationError: (operator) it is neither.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ConfigurationError(
            f"metrics.listen: {text!r} is no address", hint='write it as "127.0.0.1:9464"'
        )
    return host, int(port)


class MetricsPort:
    """The port of one registry, open until `stop`. A context manager.

    Args:
        listen: `host:port`; port 0 takes a free one, `port` tells which.
        pulse: answers `/healthz` and `/readyz`, where given.

    Raises:
        ConfigurationError: (operator) not an address.
        TransportError: (operator) the address cannot be listened on.
    """

    def __init__(self, registry: Registry, listen: str, pulse: Pulse | None = None) -> None:
        host, port = parse_listen(listen)
        try:
            self._server = _Server((host, port), registry, pulse)
        except OSError as error:
            raise TransportError(
                f"cannot listen on {listen}: {error.strerror or error}",
                hint="change metrics.listen: another program has the port, or the host is not ours",
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, name=f"metrics-{self.port}", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and frees the port. Safe to call twice."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> MetricsPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Server(HTTPServer):
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], registry: Registry, pulse: Pulse | None) -> None:
        self.registry = registry
        self.pulse = pulse
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's own, which looks the host's name up: that may wait for a name server.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that goes away in the middle is its own affair."""


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_SECONDS
    server: _Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._say(200, CONTENT_TYPE, self.server.registry.render())
            return
        probed = self.server.pulse.answer(path) if self.server.pulse is not None else None
        if probed is None:
            self.send_error(404)
            return
        status, word = probed
        self._say(status, "application/json", f'{{"status": "{word}"}}')

    def _say(self, status: int, content_type: str, text: str) -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "shoal"

    def log_message(self, format: str, *args: Any) -> None:
        """A reading every few seconds is no news."""
