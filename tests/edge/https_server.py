"""A real HTTPS server with real certificates that also knows how to break: what the device's client is tested
on.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cloud_server.enrolment.ca import CertificateAuthority
from wire.primitives import generate_tls_key

TLS_NAME = "aggregator.test"


@dataclass
class Script:
    """What the server does. Faults are lists: each request takes the next one, an empty list means none.

    Attributes:
        files: GET path to bytes, served with ranges.
        post: POST path to a function of the body and the client certificate's common name.
        cut_after: bytes of body after which the connection is cut.
        statuses: answered instead of the file.
        retry_after: what a refusal asks for.
        ignores_ranges: answers 200 and the whole file to a range request.
        requests: (method, path, Range header) as they came.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    post: dict[str, Callable[[bytes, str], tuple[int, bytes]]] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    retry_after: str = ""
    ignores_ranges: bool = False
    wrong_range: bool = False
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    connections: int = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.script.connections += 1

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        script = self.server.script
        wanted = self.headers.get("Range", "")
        script.requests.append(("GET", self.path, wanted))
        data = script.files.get(self.path)
        status = script.statuses.pop(0) if script.statuses else 200
        if data is None or status >= 400:
            self.answer(404 if status < 400 else status, b"no")
            return
        headers = {}
        if wanted and not script.ignores_ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-")) + int(script.wrong_range)
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        self.answer(status, data, headers)

    def do_POST(self) -> None:
        script = self.server.script
        script.requests.append(("POST", self.path, ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.path not in script.post:
            self.answer(404, b"{}")
            return
        self.answer(*script.post[self.path](body, self.client_name()))

    def client_name(self) -> str:
        assert isinstance(self.connection, ssl.SSLSocket)
        shown: Any = self.connection.getpeercert() or {}
        return dict(pair[0] for pair in shown.get("subject", ())).get("commonName", "")

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        script = self.server.script
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status >= 400 and script.retry_after:
            self.send_header("Retry-After", script.retry_after)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if script.cut_after and status < 400:
            self.wfile.write(data[: script.cut_after.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """Each connection makes its TLS handshake on its own thread, so that one that fails hurts no other."""

    daemon_threads = True

    def __init__(self, script: Script, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            with self.context.wrap_socket(request, server_side=True) as wrapped:
                self.RequestHandlerClass(wrapped, client_address, self)
        except OSError:
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of ours."""


@contextmanager
def https_server(
    folder: Path,
    authority: CertificateAuthority,
    script: Script,
    *,
    now: float,
    wants_client: bool = False,
    names: tuple[str, ...] = (TLS_NAME,),
) -> Iterator[str]:
    """Runs a server; gives its URL."""
    folder.mkdir(parents=True, exist_ok=True)
    key = generate_tls_key()
    (folder / "server.key").write_bytes(key)
    issued = authority.issue_server(key, names, now=now)
    (folder / "server.pem").write_text(issued.pem + authority.certificate_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    if wants_client:
        context.load_verify_locations(cadata=authority.certificate_pem)
        context.verify_mode = ssl.CERT_REQUIRED
    server = Server(script, context)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
