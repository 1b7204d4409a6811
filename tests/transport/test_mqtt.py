"""The MQTT transport against real brokers."""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from paho.mqtt import client as paho

from tests.transport.conftest import FAST, KINDS, Join
from tests.transport.mailbox import DEADLINE_SECONDS, Mailbox
from wire.backoff import Backoff
from wire.errors import BackpressureError, ConfigurationError, OversizeError
from wire.traffic import Traffic
from wire.transport import Connected, Disconnected, Packet, Published, Received
from wire.transport.broker import BrokerLimits, RunningBroker, start_broker
from wire.transport.dial import BoundedSocket
from wire.transport.mqtt import MqttTransport
from wire.transport.selector import SelectorLoop, Timer

_numbers = itertools.count()
_PACKETS = (0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x90, 0xB0, 0xD0, 0xE0, 0xF0)  # what a server may send


@pytest.fixture
def name() -> str:
    """A client id and topic level that no other test of the module uses."""
    return f"t{next(_numbers)}"


def test_publish_arrives_with_topic_payload_and_qos(broker: RunningBroker, join: Join, name: str) -> None:
    _, inbox = join(broker.port, f"{name}-in", f"{name}/+")
    inbox.next(Connected)
    client, events = join(broker.port, f"{name}-out")
    events.next(Connected)
    token = client.publish(Packet(f"{name}/a", b"hello", qos=1))
    published = events.next(Published)
    assert (published.token, published.accepted) == (token, True)
    received = inbox.next(Received).packet
    assert (received.topic, received.payload, received.qos) == (f"{name}/a", b"hello", 1)
    token = client.publish(Packet(f"{name}/b", b"", qos=0))
    assert events.next(Published).token == token
    assert inbox.next(Received).packet.topic == f"{name}/b"


def test_retained_message_reaches_a_late_subscriber_and_empty_payload_clears_it(
    broker: RunningBroker, join: Join, name: str
) -> None:
    client, events = join(broker.port, f"{name}-out")
    events.next(Connected)
    client.publish(Packet(f"{name}/now", b"state", retain=True))
    events.next(Published)
    _, inbox = join(broker.port, f"{name}-in", f"{name}/now")
    received = inbox.next(Received).packet
    assert (received.payload, received.retain) == (b"state", True)
    client.publish(Packet(f"{name}/now", b"", retain=True))
    client.publish(Packet(f"{name}/end", b"end", retain=True))
    events.take(Published, 2)
    _, late = join(broker.port, f"{name}-late", f"{name}/now", f"{name}/end")
    assert late.next(Received).packet.topic == f"{name}/end"


def test_will_speaks_when_the_connection_breaks_but_not_after_stop(
    broker: RunningBroker, join: Join, name: str
) -> None:
    _, inbox = join(broker.port, f"{name}-in", f"{name}/+")
    inbox.next(Connected)
    # It stays away for a while: a client that is back at once takes its session over, and no will is due.
    away = {"backoff": Backoff(60.0, 60.0), "rng": random.Random(1)}
    broken, broken_events = join(broker.port, f"{name}-a", will=Packet(f"{name}/a", b"broke"), **away)
    leaving, leaving_events = join(broker.port, f"{name}-b", will=Packet(f"{name}/b", b"broke"))
    broken_events.next(Connected)
    leaving_events.next(Connected)
    leaving.stop(Packet(f"{name}/b", b"goodbye"))
    assert inbox.next(Received).packet.payload == b"goodbye"
    broken.drop()
    received = inbox.next(Received).packet
    assert (received.topic, received.payload) == (f"{name}/a", b"broke")
    assert broken_events.next(Disconnected).reason == "dropped on purpose"


def test_nothing_is_lost_and_order_is_kept_through_the_window(
    broker: RunningBroker, join: Join, name: str
) -> None:
    _, inbox = join(broker.port, f"{name}-in", f"{name}/x")
    inbox.next(Connected)
    client, events = join(broker.port, f"{name}-out", inflight_window=16)
    events.next(Connected)
    tokens = [client.publish(Packet(f"{name}/x", b"%d" % number)) for number in range(200)]
    assert [event.token for event in events.take(Published, 200)] == tokens
    assert [event.packet.payload for event in inbox.take(Received, 200)] == [b"%d" % n for n in range(200)]


def test_publish_from_many_threads_arrives(broker: RunningBroker, join: Join, name: str) -> None:
    _, inbox = join(broker.port, f"{name}-in", f"{name}/#")
    inbox.next(Connected)
    client, events = join(broker.port, f"{name}-out")
    events.next(Connected)

    def publish(worker: int) -> None:
        for number in range(25):
            client.publish(Packet(f"{name}/{worker}/{number}", b"x"))

    workers = [threading.Thread(target=publish, args=(worker,)) for worker in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    topics = {event.packet.topic for event in inbox.take(Received, 200)}
    assert topics == {f"{name}/{worker}/{number}" for worker in range(8) for number in range(25)}


def test_queue_above_its_bound_is_backpressure_and_recovers(
    broker: RunningBroker, join: Join, name: str
) -> None:
    client, events = join(broker.port, f"{name}-out", queue_packets=8, inflight_window=2)
    events.next(Connected)
    accepted = _fill(client, Packet(f"{name}/x", b"x" * 1_000))
    assert 8 <= accepted < 10_000
    assert all(event.accepted for event in events.take(Published, accepted))
    client.publish(Packet(f"{name}/x", b"again"))
    assert events.next(Published).accepted


def test_publish_without_a_connection_is_backpressure(loop: SelectorLoop) -> None:
    client = MqttTransport("alone", "127.0.0.1", _closed_port(), loop=loop, backoff=FAST)
    events = Mailbox()
    client.start(events, filters=[])
    assert "refused" in events.next(Disconnected).reason
    with pytest.raises(BackpressureError, match="no connection"):
        client.publish(Packet("x", b""))
    client.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_client_comes_back_after_a_broker_restart_and_what_was_queued_arrives(
    kind: str, join: Join, tmp_path: Path
) -> None:
    first = start_broker(kind, folder=tmp_path)  # type: ignore[arg-type]
    try:
        _, inbox = join(first.port, "in", "x")
        inbox.next(Connected)
        client, events = join(first.port, "out")
        events.next(Connected)
        client.publish(Packet("x", b"before"))
        inbox.until_payload(b"before")
        first.kill()
        inbox.next(Disconnected)
        events.next(Disconnected)
        with start_broker(kind, folder=tmp_path, port=first.port):  # type: ignore[arg-type]
            inbox.next(Connected)
            events.next(Connected)
            client.publish(Packet("x", b"after"))
            inbox.until_payload(b"after")
            client.stop()
    finally:
        first.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_publications_in_flight_when_the_connection_breaks_travel_again(
    kind: str, join: Join, tmp_path: Path
) -> None:
    with start_broker(kind, folder=tmp_path) as broker:  # type: ignore[arg-type]
        _, inbox = join(broker.port, "in", "x")
        inbox.next(Connected)
        client, events = join(broker.port, "out")
        events.next(Connected)
        for number in range(100):
            client.publish(Packet("x", b"%d" % number))
        client.drop()
        wanted = {b"%d" % number for number in range(100)}
        while wanted:
            wanted.discard(inbox.next(Received).packet.payload)
        assert all(event.accepted for event in events.take(Published, 100))


def test_oversize_packet_is_refused_before_it_is_sent_and_the_client_goes_on(
    join: Join, tmp_path: Path
) -> None:
    limits = BrokerLimits(max_packet_bytes=20_000)
    with start_broker("embedded", folder=tmp_path, limits=limits) as broker:
        client, events = join(broker.port, "out", max_packet_bytes=20_000)
        assert events.next(Connected).max_packet_bytes == 20_000
        with pytest.raises(OversizeError) as raised:
            client.publish(Packet("x", b"x" * 20_000))
        assert raised.value.facts == {"size_bytes": 20_010, "limit_bytes": 20_000}
        client.publish(Packet("x", b"x" * 19_000))
        assert events.next(Published).accepted


def test_connack_narrows_size_and_window(join: Join, tmp_path: Path, mosquitto: RunningBroker) -> None:
    limits = BrokerLimits(max_packet_bytes=5_000, max_inflight=3)
    with start_broker("mosquitto", folder=tmp_path, limits=limits) as broker:
        client, events = join(broker.port, "out")
        connected = events.next(Connected)
        assert (connected.max_packet_bytes, connected.receive_maximum) == (5_000, 3)
        with pytest.raises(OversizeError):
            client.publish(Packet("x", b"x" * 5_000))
        for _ in range(20):
            client.publish(Packet("x", b"x" * 4_000))
        assert all(event.accepted for event in events.take(Published, 20))


def test_session_keeps_messages_for_a_client_that_is_away(join: Join, mosquitto: RunningBroker) -> None:
    first, inbox = join(mosquitto.port, "away", "away/x", session_expiry_seconds=600)
    assert not inbox.next(Connected).session_present
    first.stop()
    client, events = join(mosquitto.port, "out")
    events.next(Connected)
    client.publish(Packet("away/x", b"kept", expiry_seconds=600))
    events.next(Published)
    _, inbox = join(mosquitto.port, "away", "away/x", session_expiry_seconds=600)
    assert inbox.next(Connected).session_present
    received = inbox.next(Received).packet
    assert received.payload == b"kept"
    assert received.expiry_seconds is not None
    assert received.expiry_seconds <= 600


def test_receiver_that_raises_does_not_end_the_client(
    broker: RunningBroker, loop: SelectorLoop, join: Join, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    events = Mailbox()

    def deliver(event: object) -> None:
        events(event)  # type: ignore[arg-type]
        if isinstance(event, Received):
            raise ValueError("a fault of the receiver")

    fragile = MqttTransport(f"{name}-in", "127.0.0.1", broker.port, loop=loop, backoff=FAST)
    fragile.start(deliver, filters=[(f"{name}/x", 1)])
    events.next(Connected)
    client, sent = join(broker.port, f"{name}-out")
    sent.next(Connected)
    for number in range(5):
        client.publish(Packet(f"{name}/x", b"%d" % number))
    assert [event.packet.payload for event in events.take(Received, 5)] == [b"0", b"1", b"2", b"3", b"4"]
    fragile.stop()
    assert "receiver_failed" in caplog.text


def test_receiver_may_publish_and_stop_from_within_deliver(
    broker: RunningBroker, name: str, join: Join
) -> None:
    _, inbox = join(broker.port, f"{name}-in", f"{name}/answer", f"{name}/last")
    inbox.next(Connected)
    events = Mailbox()
    answering = MqttTransport(f"{name}-own-loop", "127.0.0.1", broker.port, backoff=FAST)

    def deliver(event: object) -> None:
        events(event)  # type: ignore[arg-type]
        if isinstance(event, Connected):
            answering.publish(Packet(f"{name}/answer", b"1"))
        if isinstance(event, Published):
            answering.stop(Packet(f"{name}/last", b"2"))

    answering.start(deliver, filters=[])
    assert [event.packet.payload for event in inbox.take(Received, 2)] == [b"1", b"2"]
    events.next(Disconnected)
    answering.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "shoal-mqtt"]


def test_stop_sends_what_is_queued_then_the_last_words(broker: RunningBroker, join: Join, name: str) -> None:
    _, inbox = join(broker.port, f"{name}-in", f"{name}/x")
    inbox.next(Connected)
    client, events = join(broker.port, f"{name}-out", inflight_window=2)
    events.next(Connected)
    for number in range(50):
        client.publish(Packet(f"{name}/x", b"%d" % number))
    client.stop(Packet(f"{name}/x", b"last"))
    client.stop()
    payloads = [event.packet.payload for event in inbox.take(Received, 51)]
    assert payloads == [*(b"%d" % number for number in range(50)), b"last"]
    with pytest.raises(BackpressureError):
        client.publish(Packet(f"{name}/x", b"late"))


def test_stop_of_a_client_that_never_connected_returns(loop: SelectorLoop) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and never answers CONNECT
    client = MqttTransport("alone", "127.0.0.1", silent.getsockname()[1], loop=loop, stop_timeout_seconds=0.2)
    client.start(Mailbox(), filters=[])
    client.stop(Packet("x", b"bye"))
    MqttTransport("unstarted", "127.0.0.1", 1883).stop()
    silent.close()


def test_name_is_resolved_off_the_loop(broker: RunningBroker, join: Join, name: str) -> None:
    _, events = join(broker.port, name, host="localhost")
    assert events.next(Connected).receive_maximum > 0
    _, events = join(broker.port, f"{name}-b", host="no-such-host.invalid")
    assert events.next(Disconnected).reason


def test_foreign_server_is_an_attempt_that_fails(join: Join) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    _, events = join(server.getsockname()[1], "x")
    peer, _ = server.accept()
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n" + b"Server: x\r\n" * 20)
    assert events.next(Disconnected).reason
    peer.close()
    server.close()


def test_packet_above_our_limit_ends_the_connection_unread(join: Join) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    _, events = join(server.getsockname()[1], "x", max_packet_bytes=1_000)
    peer, _ = server.accept()
    peer.sendall(b"\x20\x03\x00\x00\x00")  # CONNACK
    events.next(Connected)
    peer.sendall(b"\x30\xff\xff\xff\x7f" + b"x" * 100)  # PUBLISH of 268,435,455 bytes
    assert "above our limit of 1000" in events.next(Disconnected).reason
    peer.close()
    server.close()


@pytest.mark.parametrize(
    ("filters", "will"),
    [
        (["a/#/b"], None),
        (["a+"], None),
        ([""], None),
        ([], Packet("a/+", b"")),
        ([], Packet("a", b"", qos=2)),
    ],
)
def test_filters_and_wills_that_no_broker_takes_are_refused(filters: list[str], will: Packet | None) -> None:
    client = MqttTransport("x", "127.0.0.1", 1883)
    with pytest.raises(ConfigurationError):
        client.start(Mailbox(), filters=[(one, 1) for one in filters], will=will)
    client.stop()


def test_clean_start_of_a_persistent_session_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="clean start"):
        MqttTransport("x", "127.0.0.1", 1883, clean_start=True)
    MqttTransport("x", "127.0.0.1", 1883, clean_start=True, session_expiry_seconds=0).stop()


def test_paho_connects_over_the_socket_it_is_given() -> None:
    """The contract with paho's private `_create_socket`."""
    ours, theirs = socket.socketpair()
    assert "_create_socket" in paho.Client.__dict__
    from wire.transport.mqtt import _PahoClient

    client = _PahoClient("contract", BoundedSocket(ours, 1_000))
    client.connect("nowhere.invalid", 1, 30)
    client.loop_write()
    assert theirs.recv(100)[:9] == b"\x10\x15\x00\x04MQTT\x05"
    theirs.close()
    ours.close()


def _fill(client: MqttTransport, packet: Packet) -> int:
    """Publishes until the client refuses; how many it took."""
    for accepted in range(10_000):
        try:
            client.publish(packet)
        except BackpressureError:
            return accepted
    return 10_000


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_muted_filter_is_not_heard_until_it_is_listened_to_again(
    broker: RunningBroker, join: Join, name: str
) -> None:
    """Also of a session that the broker kept from a life that listened, and of a broker that goes on sending: the
    embedded one, of one machine."""
    sender, sent = join(broker.port, f"{name}-sender", f"{name}/none")
    sent.next(Connected)
    first, events = join(broker.port, name, f"{name}/bulk", f"{name}/small")
    events.next(Connected)
    first.stop()
    client, events = join(broker.port, name, f"{name}/bulk", f"{name}/small", muted=[f"{name}/bulk"])
    assert events.next(Connected)
    for turn in range(2):
        sender.publish(Packet(f"{name}/bulk", b"large" if turn else b"older", retain=True))
        sender.publish(Packet(f"{name}/small", b"s"))
        assert events.next(Received).packet.topic == f"{name}/small"
    client.mute([])
    heard = events.next(Received).packet
    assert (heard.topic, heard.payload) == (f"{name}/bulk", b"large")
    client.mute([f"{name}/bulk"])
    client.drop()
    events.next(Disconnected)
    events.next(Connected)
    sender.publish(Packet(f"{name}/bulk", b"large"))
    sender.publish(Packet(f"{name}/small", b"again"))
    assert events.next(Received).packet.payload == b"again"


def test_traffic_is_what_the_kernel_counts(mosquitto: RunningBroker, join: Join, name: str) -> None:
    sender, sent = join(mosquitto.port, f"{name}-sender", f"{name}/none")
    reader, received = join(mosquitto.port, name, f"{name}/a")
    received.next(Connected)
    sent.next(Connected)
    before = traffic(sender), traffic(reader)
    for _ in range(20):
        sender.publish(Packet(f"{name}/a", bytes(10_000)))
    received.take(Received, 20)
    sent.take(Published, 20)
    up, down = (
        traffic(sender).sent_bytes - before[0].sent_bytes,
        traffic(reader).received_bytes - before[1].received_bytes,
    )
    assert 200_000 < up < 230_000, "payloads, topics, and the headers of their segments"
    assert 200_000 < down < 230_000
    ended = traffic(sender).total_bytes
    sender.drop()
    sent.next(Disconnected)
    assert traffic(sender).total_bytes >= ended, "a connection that ended is not forgotten"


def traffic(client: MqttTransport) -> Traffic:
    found = client.traffic()
    assert found is not None
    return found


class _NotingLoop(SelectorLoop):
    """The real loop, which notes how long a client waits before it connects."""

    def __init__(self) -> None:
        super().__init__("test-noting")
        self.waits: queue.Queue[float] = queue.Queue()

    def call_later(self, delay_seconds: float, task: Callable[[], None]) -> Timer:
        if getattr(task, "__name__", "") == "_connect":
            self.waits.put(delay_seconds)
        return super().call_later(delay_seconds, task)


@pytest.mark.parametrize(
    ("packet", "least", "most"),
    [
        pytest.param(b"\x20\x03\x00\x89\x00", 15.0, 30.0, id="CONNACK, server busy"),
        pytest.param(b"\x20\x03\x00\x9f\x00", 15.0, 30.0, id="CONNACK, connection rate exceeded"),
        pytest.param(b"\x20\x03\x00\x87\x00", 0.0, 0.02, id="CONNACK, not authorised"),
        pytest.param(
            b"\x20\x03\x00\x00\x00\x90\x04\x00\x01\x00\x01\xe0\x01\x97",
            15.0,
            30.0,
            id="DISCONNECT, quota exceeded",
        ),
    ],
)
def test_broker_that_has_too_much_to_do_is_left_alone_for_a_while(
    packet: bytes, least: float, most: float
) -> None:
    loop, events = _NotingLoop(), Mailbox()
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = MqttTransport(
            "x", "127.0.0.1", server.getsockname()[1], loop=loop, backoff=FAST, rng=random.Random(1)
        )
        client.start(events, filters=[("a", 1)])
        peer, _ = server.accept()
        with peer:
            peer.recv(1_000)
            peer.sendall(packet)
            assert "broker" in events.next(Disconnected).reason
            assert least <= loop.waits.get(timeout=DEADLINE_SECONDS) <= most
        client.stop()
    loop.stop()


def test_fleet_that_shall_spread_comes_at_its_own_moments() -> None:
    loop = _NotingLoop()
    loop.start()
    for number in range(8):
        client = MqttTransport(f"x{number}", "127.0.0.1", 1, loop=loop, rng=random.Random(number))
        client.spread(40.0)
        client.start(Mailbox(), filters=[("a", 1)])
        client.stop()
    loop.stop()
    first = [loop.waits.get_nowait() for _ in range(8)]
    assert 0.0 <= min(first) < 10.0 < 30.0 < max(first) <= 40.0


@pytest.mark.parametrize("seed", range(25))
def test_malformed_packets_end_the_connection_and_nothing_else(
    seed: int, join: Join, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    with socket.create_server(("127.0.0.1", 0)) as server:
        _, events = join(server.getsockname()[1], "x", "a", backoff=Backoff(60.0, 60.0))
        peer, _ = server.accept()
        with peer:
            peer.sendall(b"\x20\x03\x00\x00\x00\x90\x04\x00\x01\x00\x01")  # CONNACK, SUBACK
            events.next(Connected)
            with contextlib.suppress(ConnectionError):
                for _ in range(60):
                    body = rng.randbytes(rng.randrange(40))
                    peer.sendall(bytes([rng.choice(_PACKETS) | rng.randrange(16), len(body)]) + body)
    assert events.next(Disconnected).reason
    assert "callback_failed" not in caplog.text


def test_paused_client_reads_nothing_keeps_its_connection_and_gets_all_of_it_later(
    mosquitto: RunningBroker, join: Join, name: str
) -> None:
    reader, heard = join(mosquitto.port, f"{name}-in", f"{name}/+", keepalive_seconds=1)
    heard.next(Connected)
    writer, written = join(mosquitto.port, f"{name}-out")
    written.next(Connected)
    reader.pause(True)
    for number in range(50):
        writer.publish(Packet(f"{name}/{number}", bytes([number]) * 2000))
    written.take(Published, 50)
    _wait_until_silence_is_punished(mosquitto.port, name)
    assert heard.drain() == []
    reader.pause(False)
    assert [event.packet.payload[0] for event in heard.take(Received, 50)] == list(range(50))
    assert not any(isinstance(event, Disconnected) for event in heard.seen)


def _wait_until_silence_is_punished(port: int, name: str) -> None:
    """Until the broker has closed the connection of a client with the shortest keep-alive that says nothing."""
    named = name.encode()
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_SECONDS) as silent:
        head = b"\x00\x04MQTT\x04\x02\x00\x01"
        silent.sendall(bytes([0x10, len(head) + 2 + len(named)]) + head + bytes([0, len(named)]) + named)
        while silent.recv(64):
            pass
