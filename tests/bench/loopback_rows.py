"""A measurement for tests: what the loopback counter says of bytes that this process sent over it."""

from __future__ import annotations

import socket

from bench.table import Row
from fleet.processes import loopback_bytes


def sent_over_loopback(size_bytes: int) -> list[Row]:
    before = loopback_bytes()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sender,
        server.accept()[0] as receiver,
    ):
        sender.sendall(bytes(size_bytes))
        sender.shutdown(socket.SHUT_WR)
        received = 0
        while piece := receiver.recv(65_536):
            received += len(piece)
    return [Row("bytes counted", loopback_bytes() - before, unit="B", note=f"{received} received")]
