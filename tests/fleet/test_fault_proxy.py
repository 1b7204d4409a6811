"""The proxy that breaks links does what each of its faults says, and nothing when it is clear."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from fleet.real_chaos.proxy import FaultProxy

DATA = bytes(range(256)) * 40
PATIENCE_SECONDS = 60.0


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    """In front of a server that says again whatever it hears."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=echo, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        with FaultProxy({"link": server.getsockname()[1]}, seed=1) as made:
            yield made
        server.shutdown(socket.SHUT_RDWR)


def echo(connection: socket.socket) -> None:
    with connection:
        try:
            while data := connection.recv(65_536):
                connection.sendall(data)
        except OSError:
            return


def connect(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port("link")), timeout=PATIENCE_SECONDS)


def read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(65_536)
        if not piece:
            raise ConnectionResetError
        data += piece
    return data


def talk_for_ever(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"again")
        read(connection, 5)


@pytest.mark.parametrize("mode", ["clear", "late", "slow"])
def test_link_that_only_delays_delivers_everything_in_order(proxy: FaultProxy, mode: str) -> None:
    proxy.become("link", mode)  # type: ignore[arg-type]
    with connect(proxy) as connection:
        connection.sendall(DATA[:2000])
        assert read(connection, 2000) == DATA[:2000]
    assert (proxy.hits("link") > 0) == (mode != "clear")


def test_black_hole_holds_back_what_comes_and_lets_it_through_when_it_ends(proxy: FaultProxy) -> None:
    with connect(proxy) as old:
        old.sendall(b"before")
        assert read(old, 6) == b"before"
        proxy.become("link", "black_hole")
        with connect(proxy) as new:
            old.sendall(b"held")
            new.sendall(b"too")
            old.settimeout(0.2)
            with pytest.raises(TimeoutError):
                old.recv(1)
            old.settimeout(PATIENCE_SECONDS)
            proxy.become("link", "clear")
            assert (read(old, 4), read(new, 3)) == (b"held", b"too")
    assert proxy.hits("link") >= 2


def test_refused_link_cuts_what_is_there_and_refuses_what_comes_until_it_ends(proxy: FaultProxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(b"before")
        assert read(connection, 6) == b"before"
        proxy.become("link", "refused")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    assert proxy.hits("link") == 1
    proxy.become("link", "clear")
    with connect(proxy) as connection:
        connection.sendall(b"after")
        assert read(connection, 5) == b"after"


def test_resets_break_a_connection_and_say_so(proxy: FaultProxy) -> None:
    proxy.become("link", "resets")
    with connect(proxy) as connection, pytest.raises((ConnectionResetError, BrokenPipeError)):
        talk_for_ever(connection)
    assert proxy.hits("link") == 1


def test_flipped_bits_are_single_ones(proxy: FaultProxy) -> None:
    proxy.become("link", "bit_flips")
    flipped = 0
    with connect(proxy) as connection:
        while not flipped:
            connection.sendall(b"\0" * 64)
            flipped = int.from_bytes(read(connection, 64), "big").bit_count()
    assert flipped == proxy.hits("link")
