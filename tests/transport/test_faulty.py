"""Fault injection over the in-memory broker."""

from __future__ import annotations

import random

import pytest

from tests.transport.test_memory import Clock
from wire.errors import BackpressureError, ConfigurationError
from wire.transport import Connected, Disconnected, Packet, Published, Received, TransportEvent
from wire.transport.faulty import KINDS, FaultPlan, FaultyTransport
from wire.transport.memory import MemoryBroker, MemoryTransport


class Link:
    """A publisher whose transport is faulty on its way up, and an honest receiver."""

    def __init__(self, plan: FaultPlan, seed: int = 1) -> None:
        self.clock = Clock()
        self.broker = MemoryBroker(self.clock)
        self.inbox: list[TransportEvent] = []
        self.events: list[TransportEvent] = []
        MemoryTransport(self.broker, "in").start(self.inbox.append, filters=[("a", 1)])
        self.faulty = FaultyTransport(MemoryTransport(self.broker, "out"), plan, random.Random(seed))
        self.faulty.start(self.events.append, filters=[("down", 1)])
        self.broker.pump()

    def send(self, count: int) -> None:
        for number in range(count):
            self.faulty.publish(Packet("a", b"%04d" % number))
            self.broker.pump()

    def payloads(self) -> list[bytes]:
        return [event.packet.payload for event in self.inbox if isinstance(event, Received)]


def numbers(count: int) -> list[bytes]:
    return [b"%04d" % number for number in range(count)]


def test_plan_without_faults_changes_nothing() -> None:
    link = Link(FaultPlan())
    link.send(20)
    assert link.payloads() == numbers(20)
    assert sum(isinstance(event, Published) for event in link.events) == 20
    assert not link.faulty.faults


def test_lost_packets_never_arrive_and_are_still_acknowledged() -> None:
    link = Link(FaultPlan(lose=0.3))
    link.send(100)
    link.faulty.tick()
    lost = link.faulty.faults["lose"]
    assert 10 < lost < 60
    assert len(link.payloads()) == 100 - lost
    assert sum(isinstance(event, Published) and event.accepted for event in link.events) == 100


def test_doubled_packets_arrive_twice_in_a_row_and_are_acknowledged_once() -> None:
    link = Link(FaultPlan(double=1.0))
    link.send(3)
    assert link.payloads() == [b"0000", b"0000", b"0001", b"0001", b"0002", b"0002"]
    assert sum(isinstance(event, Published) for event in link.events) == 3


@pytest.mark.parametrize("plan", [FaultPlan(reorder=0.3), FaultPlan(delay=0.2, delay_packets=5)])
def test_reordered_and_delayed_packets_all_arrive_but_in_another_order(plan: FaultPlan) -> None:
    link = Link(plan)
    link.send(100)
    link.faulty.tick()
    link.broker.pump()
    assert link.payloads() != numbers(100)
    assert sorted(link.payloads()) == numbers(100)


def test_truncated_and_corrupted_packets_differ_from_what_was_sent() -> None:
    link = Link(FaultPlan(truncate=0.5, corrupt=0.5))
    link.send(50)
    harmed = link.payloads()
    assert len(harmed) == 50
    assert all(one != sent for one, sent in zip(harmed, numbers(50), strict=True))
    assert sum(len(one) < 4 for one in harmed) == link.faulty.faults["truncate"]
    assert link.faulty.faults["truncate"] + link.faulty.faults["corrupt"] == 50


def test_disconnect_cuts_the_connection_and_refuses_the_packet() -> None:
    link = Link(FaultPlan(disconnect=1.0, directions=("up",)))
    link.faulty.publish(Packet("a", b"x"))
    assert isinstance(link.events[-1], Disconnected)
    with pytest.raises(BackpressureError):
        link.faulty.publish(Packet("a", b"x"))
    link.broker.pump()
    assert Published(1, False, "the connection was lost") in link.events
    assert isinstance(link.events[-1], Connected)
    assert link.payloads() == []


def test_downward_faults_harm_what_is_received() -> None:
    link = Link(FaultPlan(lose=0.2, double=0.2, corrupt=0.2, directions=("down",)))
    sender = MemoryTransport(link.broker, "sender")
    sender.start(lambda event: None, filters=[])
    link.broker.pump()
    for number in range(100):
        sender.publish(Packet("down", b"%04d" % number))
    link.broker.pump()
    received = [event.packet.payload for event in link.events if isinstance(event, Received)]
    faults = link.faulty.faults
    assert len(received) == 100 - faults["lose"] + faults["double"]
    assert sum(payload not in set(numbers(100)) for payload in received) <= faults["corrupt"]
    assert min(faults[kind] for kind in ("lose", "double", "corrupt")) > 5


def test_same_seed_gives_the_same_faults() -> None:
    plan = FaultPlan(0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05)

    def trace(seed: int) -> tuple[list[bytes], dict[str, int]]:
        link = Link(plan, seed)
        link.send(300)
        link.faulty.tick()
        link.broker.pump()
        return link.payloads(), dict(link.faulty.faults)

    assert trace(3) == trace(3)
    assert trace(3) != trace(4)
    assert set(trace(3)[1]) == set(KINDS)


@pytest.mark.parametrize("options", [{"lose": -0.1}, {"lose": 0.6, "double": 0.6}, {"delay_packets": 0}])
def test_impossible_plan_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        FaultPlan(**options)  # type: ignore[arg-type]
