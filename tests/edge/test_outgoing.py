"""The queue in front of the transport: what the cloud waits for goes first, what may be lost goes last."""

from __future__ import annotations

import itertools

import pytest

from edge_agent.uplink import outgoing
from edge_agent.uplink.outgoing import Outgoing
from tests.edge.lab import VirtualTime
from wire.transport import Connected, Packet, Received, TransportEvent
from wire.transport.memory import MemoryBroker, MemoryTransport

TELEMETRY = Packet("fl/1/t/f/tm/dev", b"telemetry", qos=0)
JOIN = Packet("fl/1/t/f/jn/dev", b"join", qos=1)


def chunk(index: int) -> Packet:
    return Packet(f"fl/1/t/f/up/0/dev/1/{index}", b"chunk %d" % index, qos=1)


class Line:
    """A transport that takes `room` packets at a time, and somebody who hears them."""

    def __init__(self, room: int) -> None:
        self.time = VirtualTime()
        self.broker = MemoryBroker(self.time, receive_maximum=room)
        self.heard: list[bytes] = []
        listener = MemoryTransport(self.broker, "listener")
        listener.start(self._hear, filters=[("fl/1/t/f/#", 1)])
        self.transport = MemoryTransport(self.broker, "dev")
        self.events: list[TransportEvent] = []
        self.transport.start(self.events.append, filters=[])
        self.pump()
        assert any(isinstance(event, Connected) for event in self.events)
        self.outgoing = Outgoing(self.transport)

    def _hear(self, event: TransportEvent) -> None:
        if isinstance(event, Received):
            self.heard.append(event.packet.payload)

    def pump(self) -> None:
        while self.broker.pump():
            pass

    def send_all(self) -> list[bytes]:
        for _ in itertools.repeat(None, 100):
            self.outgoing.pump()
            self.pump()
        return self.heard


def test_updates_go_before_telemetry_and_answers_before_both() -> None:
    line = Line(room=1)
    line.outgoing.say(TELEMETRY)
    line.outgoing.upload(b"update", [chunk(0), chunk(1)])
    line.outgoing.say(JOIN, survives=True)
    assert line.send_all() == [b"join", b"chunk 0", b"chunk 1", b"telemetry"]


def test_full_queue_gives_up_what_may_be_lost_and_no_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "MAX_QUEUED", 4)
    line = Line(room=1)
    for _ in range(6):
        line.outgoing.say(TELEMETRY)
    line.outgoing.upload(b"update", [chunk(0), chunk(1), chunk(2)])
    line.outgoing.say(TELEMETRY)
    assert line.outgoing.dropped_total == 2 + 3 + 1
    assert line.send_all() == [b"chunk 0", b"chunk 1", b"chunk 2", b"telemetry"]


def test_queue_full_of_updates_drops_what_comes_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "MAX_QUEUED", 2)
    line = Line(room=1)
    line.outgoing.upload(b"update", [chunk(0), chunk(1), chunk(2)])
    assert line.outgoing.dropped_total == 1
    assert line.send_all() == [b"chunk 0", b"chunk 1"]
    line.outgoing.upload(b"update", [chunk(2)])
    assert line.send_all()[-1] == b"chunk 2"


def test_lost_connection_keeps_the_answers_only() -> None:
    line = Line(room=1)
    line.outgoing.say(TELEMETRY)
    line.outgoing.say(JOIN, survives=True)
    line.outgoing.upload(b"update", [chunk(0)])
    line.outgoing.connection_lost()
    assert line.send_all() == [b"join"]
