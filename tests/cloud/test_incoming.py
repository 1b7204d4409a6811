"""The queue between the transport and the loop: it slows the broker down and drops nothing."""

from __future__ import annotations

import queue
import threading

import pytest

from cloud_server.incoming import Incoming
from wire.transport import Connected, Packet, Received

EVENTS = 5_000


def received(number: int, size_bytes: int = 1) -> Received:
    return Received(Packet(f"t/{number}", bytes(size_bytes)))


def test_reading_stops_at_the_room_and_goes_on_at_half_of_it() -> None:
    asked: list[bool] = []
    incoming = Incoming(asked.append, room=4)
    for number in range(4):
        incoming.put(received(number))
    assert asked == [True]
    incoming.put(received(4))
    assert (asked, incoming.waiting(), incoming.paused_total) == ([True], 5, 1)
    for _ in range(3):
        incoming.take(0.0)
    assert asked == [True]
    incoming.take(0.0)
    assert asked == [True, False]


def test_few_large_messages_stop_reading_as_many_small_ones_do() -> None:
    asked: list[bool] = []
    incoming = Incoming(asked.append, room_bytes=1000)
    incoming.put(received(0, 600))
    incoming.put(Connected(True, 1, 1))
    assert asked == []
    incoming.put(received(1, 600))
    assert asked == [True]
    incoming.take(0.0)
    incoming.take(0.0)
    assert asked == [True]
    incoming.take(0.0)
    assert asked == [True, False]


def test_nothing_waits_is_said_at_once() -> None:
    incoming = Incoming(lambda is_paused: None)
    with pytest.raises(queue.Empty):
        incoming.take(0.0)
    incoming.put(None)
    assert incoming.take(1.0) is None


def test_all_that_a_faster_transport_brings_is_taken_in_order() -> None:
    """The transport obeys the brake, as the real one does, and stands still until it is let go."""
    may_read = threading.Event()
    may_read.set()
    incoming = Incoming(lambda is_paused: may_read.clear() if is_paused else may_read.set(), room=3)

    def bring() -> None:
        for number in range(EVENTS):
            assert may_read.wait(60.0)
            incoming.put(received(number))

    transport = threading.Thread(target=bring)
    transport.start()
    taken = [incoming.take(60.0) for _ in range(EVENTS)]
    transport.join()
    assert [event.packet.topic for event in taken if isinstance(event, Received)] == [
        f"t/{number}" for number in range(EVENTS)
    ]
    assert may_read.is_set()
