"""The selector loop: calls, timers, sockets, and many clients on one thread."""

from __future__ import annotations

import selectors
import socket
import threading

import pytest

from tests.transport.conftest import Join
from wire.transport import Connected, Packet, Received
from wire.transport.broker import RunningBroker
from wire.transport.selector import SelectorLoop


def test_calls_from_other_threads_run_on_the_loop_in_order(loop: SelectorLoop) -> None:
    ran: list[tuple[int, bool]] = []
    done = threading.Event()
    for number in range(100):
        loop.call_soon(lambda number=number: ran.append((number, loop.is_current())))  # type: ignore[misc]
    loop.call_soon(done.set)
    assert done.wait(10)
    assert ran == [(number, True) for number in range(100)]
    assert not loop.is_current()


def test_timers_fire_in_the_order_of_their_time_and_a_cancelled_one_never(loop: SelectorLoop) -> None:
    ran: list[str] = []
    done = threading.Event()
    loop.call_later(0.06, done.set)
    loop.call_later(0.04, lambda: ran.append("later"))
    cancelled = loop.call_later(0.02, lambda: ran.append("cancelled"))
    loop.call_later(0.0, lambda: ran.append("sooner"))
    cancelled.cancel()
    assert done.wait(10)
    assert ran == ["sooner", "later"]


def test_call_that_raises_is_logged_and_the_loop_goes_on(
    loop: SelectorLoop, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()

    def fail() -> None:
        raise ValueError("a fault in a callback")

    loop.call_soon(fail)
    loop.call_later(0.0, fail)
    loop.call_later(0.01, done.set)
    assert done.wait(10)
    assert caplog.text.count("a fault in a callback") >= 2


def test_readable_socket_is_reported_until_it_is_unregistered(loop: SelectorLoop) -> None:
    ours, theirs = socket.socketpair()
    got: list[bytes] = []
    done = threading.Event()

    def ready(events: int) -> None:
        assert events == selectors.EVENT_READ
        got.append(ours.recv(1))
        if len(got) == 3:
            loop.unregister(ours)
            loop.unregister(ours)
            done.set()

    with ours, theirs:
        loop.call_soon(lambda: loop.register(ours, selectors.EVENT_READ, ready))
        theirs.sendall(b"abcd")
        assert done.wait(10)
    assert got == [b"a", b"b", b"c"]


def test_socket_whose_callback_raises_is_waited_for_no_more(
    loop: SelectorLoop, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = socket.socketpair()
    done = threading.Event()

    def ready(_events: int) -> None:
        loop.call_later(0.02, done.set)
        raise ValueError("a fault that would come again at once")

    with ours, theirs:
        loop.call_soon(lambda: loop.register(ours, selectors.EVENT_READ, ready))
        theirs.sendall(b"x")
        assert done.wait(10)
    assert caplog.text.count("callback_failed") == 1


def test_stop_ends_the_thread_and_is_safe_to_repeat() -> None:
    loop = SelectorLoop("ends")
    loop.start()
    loop.start()
    loop.stop()
    loop.stop()
    loop.call_soon(lambda: None)
    assert not [thread for thread in threading.enumerate() if thread.name == "ends"]
    with pytest.raises(RuntimeError):
        loop.start()
    SelectorLoop("never started").stop()


def test_hundreds_of_clients_share_one_thread(broker: RunningBroker, join: Join) -> None:
    """paho's own threads stop at 338."""
    before = threading.active_count()
    clients = [join(broker.port, f"many{number}", "many/all", f"many/{number}") for number in range(400)]
    for _, events in clients:
        events.next(Connected)
    assert threading.active_count() == before
    clients[0][0].publish(Packet("many/all", b"round"))
    for number, (_, events) in enumerate(clients):
        assert events.next(Received).packet.topic == "many/all"
        clients[number - 1][0].publish(Packet(f"many/{number}", b"%d" % number))
    for number, (_, events) in enumerate(clients):
        assert events.next(Received).packet.payload == b"%d" % number
