"""The pure parts of the client: queue and window, packet sizes, back-off."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from wire.errors import BackpressureError
from wire.transport import Packet
from wire.transport.dial import BoundedSocket
from wire.transport.mqtt import _PahoClient, _publish_properties
from wire.transport.topic_filters import matches, publish_size_bytes
from wire.transport.window import SendWindow


class WindowMachine(RuleBasedStateMachine):
    """Whatever happens, every accepted token ends exactly once, QoS 1 order is kept, and the bounds hold."""

    def __init__(self) -> None:
        super().__init__()
        self.window = SendWindow(inflight_window=3, queue_packets=5, queue_bytes=10_000)
        self.accepted: list[int] = []
        self.inflight: list[tuple[int, int]] = []
        self.ended: list[int] = []
        self.refused_with_nothing_queued = False

    @rule(qos=st.sampled_from([0, 1]), size=st.integers(0, 3_000))
    def push(self, qos: int, size: int) -> None:
        try:
            self.accepted.append(self.window.push(Packet("t", bytes(size), qos=qos)))
        except BackpressureError:
            self.refused_with_nothing_queued |= len(self.accepted) == len(self.ended) + len(self.inflight)

    @rule()
    def take(self) -> None:
        entry = self.window.take(now=float(len(self.ended)))
        if entry is not None:
            assert all(entry.token > token for token, _ in self.inflight)
            self.inflight.append((entry.token, entry.packet.qos))

    @precondition(lambda self: self.inflight)
    @rule(position=st.integers(0, 2))
    def settle(self, position: int) -> None:
        token, _ = self.inflight.pop(position % len(self.inflight))
        assert self.window.settle(token)
        assert not self.window.settle(token)
        self.ended.append(token)

    @rule()
    def lose_connection(self) -> None:
        lost = self.window.connection_lost()
        assert lost == [token for token, qos in self.inflight if qos == 0]
        self.ended += lost
        self.inflight.clear()
        assert self.window.oldest_since() is None

    @rule(maximum=st.integers(0, 5))
    def reconnect(self, maximum: int) -> None:
        self.window.set_receive_maximum(maximum)

    @rule(limit=st.integers(500, 3_000))
    def limit_size(self, limit: int) -> None:
        self.ended += self.window.drop_larger(limit)

    @invariant()
    def bounds_hold(self) -> None:
        assert not self.refused_with_nothing_queued
        assert len(self.inflight) <= 3
        assert len(set(self.ended)) == len(self.ended)

    def teardown(self) -> None:
        self.ended += self.window.drop_all()
        assert sorted(self.ended) == self.accepted
        assert self.window.is_idle


TestWindow = WindowMachine.TestCase


def test_a_packet_larger_than_the_queue_passes_when_the_queue_is_empty() -> None:
    window = SendWindow(1, 5, queue_bytes=10)
    window.push(Packet("t", bytes(100)))
    with pytest.raises(BackpressureError):
        window.push(Packet("t", b""))
    window.push(Packet("t", b"last words"), unbounded=True)


@pytest.mark.parametrize("payload_bytes", [0, 1, 100, 117, 118, 119, 16_370, 16_377, 16_378, 100_000])
@pytest.mark.parametrize(("qos", "expiry"), [(0, None), (1, None), (1, 60)])
def test_size_of_a_publish_is_what_paho_writes(payload_bytes: int, qos: int, expiry: int | None) -> None:
    packet = Packet("topic/ä", bytes(payload_bytes), qos=qos, expiry_seconds=expiry)
    ours, theirs = socket.socketpair()
    with theirs:
        client = _PahoClient("x", BoundedSocket(ours, 1_000_000))
        client.connect("nowhere.invalid", 1)
        client.loop_write()
        theirs.recv(1_000)
        client.publish(packet.topic, packet.payload, qos, False, _publish_properties(expiry, 3))
        written = 0
        while written < publish_size_bytes(packet):
            client.loop_write()
            written += len(theirs.recv(200_000))
        assert written == publish_size_bytes(packet)
        assert not client.want_write()
        ours.close()


@given(st.lists(st.sampled_from(["a", "b", "$x", ""]), min_size=1, max_size=4), st.integers(0, 15))
def test_wildcard_made_from_a_topic_matches_it(levels: list[str], mask: int) -> None:
    topic = "/".join(levels)
    wild = ["+" if mask >> index & 1 else level for index, level in enumerate(levels)]
    system = levels[0].startswith("$") and wild[0] == "+"
    assert matches("/".join(wild), topic) is not system
    assert matches("/".join([*wild, "#"]), topic) is not system
    assert not matches("/".join([*wild, "+"]), topic)


def test_bounded_socket_reads_ahead_and_keeps_the_order() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"abcdef")
        bounded = BoundedSocket(ours, 4)
        bounded.setblocking(False)
        assert bounded.recv(1) == b"a"
        assert bounded.pending() == 5
        assert [bounded.recv(4), bounded.recv(4)] == [b"bcde", b"f"]
        with pytest.raises(BlockingIOError):
            bounded.recv(1)
        with pytest.raises(ConnectionError, match="above our limit"):
            bounded.recv(5)
        theirs.close()
        assert bounded.recv(1) == b""
