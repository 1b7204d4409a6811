"""The in-memory broker: what the simulation of a fleet stands on."""

from __future__ import annotations

import random

import pytest

from wire.errors import BackpressureError, ConfigurationError, OversizeError
from wire.transport import Connected, Disconnected, Packet, Published, Received, TransportEvent
from wire.transport.memory import MemoryBroker, MemoryTransport


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def broker(clock: Clock) -> MemoryBroker:
    return MemoryBroker(clock)


def join(
    broker: MemoryBroker,
    client_id: str,
    *filters: str,
    will: Packet | None = None,
    qos: int = 1,
    **options: float,
) -> tuple[MemoryTransport, list[TransportEvent]]:
    events: list[TransportEvent] = []
    client = MemoryTransport(broker, client_id, **options)  # type: ignore[arg-type]
    client.start(events.append, filters=[(name, qos) for name in filters], will=will)
    broker.pump()
    return client, events


def payloads(events: list[TransportEvent]) -> list[bytes]:
    return [event.packet.payload for event in events if isinstance(event, Received)]


def test_publish_is_delivered_by_pump_and_acknowledged(broker: MemoryBroker) -> None:
    _, inbox = join(broker, "in", "a/+")
    client, events = join(broker, "out")
    token = client.publish(Packet("a/b", b"1"))
    assert payloads(inbox) == []
    assert broker.pump() == 1
    assert inbox == [Connected(False, 131_072, 65_535), Received(Packet("a/b", b"1"))]
    assert events[-1] == Published(token, accepted=True)


def test_nothing_happens_outside_of_pump(broker: MemoryBroker) -> None:
    events: list[TransportEvent] = []
    client = MemoryTransport(broker, "x")
    client.start(events.append, filters=[])
    assert events == []
    with pytest.raises(BackpressureError, match="no connection"):
        client.publish(Packet("a", b""))


@pytest.mark.parametrize(
    ("topic_filter", "topic", "falls_under"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/b/c", False),
        ("a/+/c", "a/b/c", True),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/b", "a/b", True),
        ("+/+", "a", False),
    ],
)
def test_filters_match_as_mqtt_has_it(
    broker: MemoryBroker, topic_filter: str, topic: str, falls_under: bool
) -> None:
    _, inbox = join(broker, "in", topic_filter)
    client, _ = join(broker, "out")
    client.publish(Packet(topic, b"x"))
    broker.pump()
    assert bool(payloads(inbox)) is falls_under


def test_overlapping_filters_deliver_once_with_the_highest_qos(broker: MemoryBroker) -> None:
    events: list[TransportEvent] = []
    MemoryTransport(broker, "in").start(events.append, filters=[("a/+", 0), ("a/b", 1), ("#", 0)])
    client, _ = join(broker, "out")
    client.publish(Packet("a/b", b"x"))
    client.publish(Packet("a/c", b"y"))
    broker.pump()
    assert [event.packet.qos for event in events if isinstance(event, Received)] == [1, 0]


def test_retained_message_reaches_late_subscribers_until_it_expires_or_is_cleared(
    broker: MemoryBroker, clock: Clock
) -> None:
    client, _ = join(broker, "out")
    client.publish(Packet("st/a", b"birth", retain=True))
    client.publish(Packet("st/b", b"short", retain=True, expiry_seconds=10))
    broker.pump()
    _, early = join(broker, "early", "st/+", "st/a")
    assert [event.packet.retain for event in early if isinstance(event, Received)] == [True, True]
    clock.seconds += 10
    _, late = join(broker, "late", "st/+")
    assert payloads(late) == [b"birth"]
    client.publish(Packet("st/a", b"", retain=True))
    broker.pump()
    assert payloads(late) == [b"birth", b""]
    _, last = join(broker, "last", "st/+", "st/a")
    assert payloads(last) == []


def test_live_copy_of_a_retained_message_is_not_marked_retained(broker: MemoryBroker) -> None:
    _, inbox = join(broker, "in", "a")
    client, _ = join(broker, "out")
    client.publish(Packet("a", b"x", retain=True))
    broker.pump()
    assert inbox[-1] == Received(Packet("a", b"x", retain=False))


def test_will_speaks_after_a_cut_and_not_after_stop(broker: MemoryBroker) -> None:
    _, inbox = join(broker, "in", "st/+")
    _, cut_events = join(broker, "a", will=Packet("st/a", b"gone"))
    stopped, _ = join(broker, "b", will=Packet("st/b", b"gone"))
    broker.cut("a", for_seconds=5)
    stopped.stop(Packet("st/b", b"bye"))
    broker.pump()
    assert payloads(inbox) == [b"gone", b"bye"]
    assert cut_events[-1] == Disconnected("cut")
    assert not broker.is_connected("a")


def test_client_that_was_cut_comes_back_when_its_time_has_come(broker: MemoryBroker, clock: Clock) -> None:
    client, events = join(broker, "a", "x")
    broker.cut("a", for_seconds=5)
    with pytest.raises(BackpressureError):
        client.publish(Packet("y", b""))
    assert broker.next_due() == 105.0
    broker.pump()
    assert not broker.is_connected("a")
    clock.seconds += 5
    broker.pump()
    assert events[-1] == Connected(True, 131_072, 65_535)
    assert broker.next_due() is None


def test_session_keeps_qos_1_messages_until_they_expire(broker: MemoryBroker, clock: Clock) -> None:
    _, inbox = join(broker, "in", "a")
    client, _ = join(broker, "out")
    broker.cut("in", for_seconds=10)
    for packet in (
        Packet("a", b"kept"),
        Packet("a", b"short", expiry_seconds=5),
        Packet("a", b"qos 0", qos=0),
        Packet("a", b"long", expiry_seconds=50),
    ):
        client.publish(packet)
    broker.pump()
    clock.seconds += 10
    broker.pump()
    assert payloads(inbox) == [b"kept", b"long"]


def test_session_queue_is_bounded_and_drops_are_counted(clock: Clock) -> None:
    broker = MemoryBroker(clock, session_queue_packets=3)
    _, inbox = join(broker, "in", "a")
    client, events = join(broker, "out")
    broker.cut("in", for_seconds=1)
    for number in range(5):
        client.publish(Packet("a", b"%d" % number))
    broker.pump()
    clock.seconds += 1
    broker.pump()
    assert payloads(inbox) == [b"0", b"1", b"2"]
    assert broker.dropped_total == 2
    assert (
        sum(isinstance(event, Published) and event.accepted for event in events) == 5
    )  # and nobody was told


def test_session_ends_after_its_expiry_or_with_a_clean_start(broker: MemoryBroker, clock: Clock) -> None:
    first, _ = join(broker, "a", "x", session_expiry_seconds=60)
    first.stop()
    second, events = join(broker, "a", "x", session_expiry_seconds=60)
    assert events[0] == Connected(True, 131_072, 65_535)
    second.stop()
    clock.seconds += 60
    third, events = join(broker, "a", "x", session_expiry_seconds=60)
    assert events[0] == Connected(False, 131_072, 65_535)
    third.stop()
    _, events = join(broker, "a", "x", clean_start=True)
    assert events[0] == Connected(False, 131_072, 65_535)


def test_second_client_of_one_id_takes_the_session_over(broker: MemoryBroker) -> None:
    _, first = join(broker, "a", "x", will=Packet("st", b"gone"))
    _, second = join(broker, "a", "x")
    assert first[-1] == Disconnected("session taken over")
    assert second == [Connected(True, 131_072, 65_535)]
    broker.pump()
    assert broker.next_due() is None


def test_publication_under_way_when_cut_travels_again_at_qos_1(broker: MemoryBroker, clock: Clock) -> None:
    _, inbox = join(broker, "in", "a")
    client, events = join(broker, "out")
    lost = client.publish(Packet("a", b"qos 0", qos=0))
    kept = client.publish(Packet("a", b"qos 1"))
    client.drop(for_seconds=3)
    broker.pump()
    assert payloads(inbox) == []
    assert events[1:] == [
        Published(lost, False, "the connection was lost"),
        Disconnected("dropped on purpose"),
    ]
    clock.seconds += 3
    broker.pump()
    assert payloads(inbox) == [b"qos 1"]
    assert events[-1] == Published(kept, True)


def test_limits_are_backpressure_and_oversize(clock: Clock) -> None:
    broker = MemoryBroker(clock, max_packet_bytes=100)
    client, _ = join(broker, "a", queue_packets=2)
    with pytest.raises(OversizeError) as raised:
        client.publish(Packet("a", b"x" * 100))
    assert raised.value.facts["limit_bytes"] == 100
    client.publish(Packet("a", b"1"))
    client.publish(Packet("a", b"2"))
    with pytest.raises(BackpressureError, match="full"):
        client.publish(Packet("a", b"3"))
    broker.pump()
    client.publish(Packet("a", b"3"))


@pytest.mark.parametrize("packet", [Packet("a/#", b""), Packet("", b""), Packet("a", b"", qos=2)])
def test_packet_that_no_broker_takes_is_refused(broker: MemoryBroker, packet: Packet) -> None:
    client, _ = join(broker, "a")
    with pytest.raises(ConfigurationError):
        client.publish(packet)


def test_payloads_are_shared_not_copied(broker: MemoryBroker) -> None:
    inboxes = [join(broker, f"in{number}", "bl/+/+")[1] for number in range(3)]
    client, _ = join(broker, "out")
    payload = b"x" * 1_000
    client.publish(Packet("bl/a/0", payload))
    broker.pump()
    received = [event.packet.payload for inbox in inboxes for event in inbox if isinstance(event, Received)]
    assert all(one is payload for one in received)
    assert len(received) == 3


def test_answers_from_within_deliver_belong_to_the_same_pump(broker: MemoryBroker) -> None:
    _, inbox = join(broker, "in", "answer")
    answering = MemoryTransport(broker, "answering")

    def deliver(event: TransportEvent) -> None:
        if isinstance(event, Received):
            answering.publish(Packet("answer", event.packet.payload))

    answering.start(deliver, filters=[("question", 1)])
    client, _ = join(broker, "out")
    client.publish(Packet("question", b"1"))
    client.publish(Packet("question", b"2"))
    assert broker.pump() == 4
    assert payloads(inbox) == [b"1", b"2"]


def test_same_calls_give_the_same_deliveries() -> None:
    def replay(seed: int) -> list[tuple[str, TransportEvent]]:
        rng, clock = random.Random(seed), Clock()
        broker = MemoryBroker(clock, session_queue_packets=5)
        trace: list[tuple[str, TransportEvent]] = []
        clients = []
        for number in range(8):
            client = MemoryTransport(broker, f"c{number}")
            client.start(
                lambda event, number=number: trace.append((f"c{number}", event)),  # type: ignore[misc]
                filters=[(f"t/{number % 3}", 1), ("all/#", number % 2)],
                will=Packet(f"t/{number % 3}", b"will"),
            )
            clients.append(client)
        broker.pump()
        for step in range(300):
            clock.seconds += rng.random()
            client = rng.choice(clients)
            if rng.random() < 0.2:
                client.drop(for_seconds=rng.random() * 3)
            elif broker.is_connected(client.client_id):
                client.publish(Packet(rng.choice(["t/0", "t/1", "all/x", "all/y"]), b"%d" % step))
            if rng.random() < 0.5:
                broker.pump()
        return trace

    assert replay(7) == replay(7)
    assert replay(7) != replay(8)
    assert len(replay(7)) > 300


def test_exact_topics_cost_nothing_for_clients_that_do_not_listen(broker: MemoryBroker) -> None:
    """A round of 500 devices touches each device once, not 500 times."""
    touched: list[str] = []
    for number in range(500):
        name = f"d{number}"
        MemoryTransport(broker, name).start(
            lambda event, name=name: touched.append(name) if isinstance(event, Received) else None,  # type: ignore[misc]
            filters=[(f"cm/{name}", 1), (f"ak/{name}", 1), ("bl/+/+", 1)],
        )
    client, _ = join(broker, "cloud", "up/+/+/+/+")
    for number in range(500):
        client.publish(Packet(f"cm/d{number}", b"order"))
        client.publish(Packet(f"up/0/d{number}/1/0", b"update"))
    assert broker.pump() == 1_000
    assert touched == [f"d{number}" for number in range(500)]
