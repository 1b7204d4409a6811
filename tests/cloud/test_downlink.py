"""What the cloud says opens for the one that it is meant for, and for nobody else."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cloud_server.downlink import DEVICE_BUDGET, FLEET_BUDGET, SMALL_BLOB_CHUNKS, Downlink
from cloud_server.sender import Sender
from fleet.virtual import VirtualTime
from wire.envelope import Expect, Signer, open_signed
from wire.errors import BackpressureError, ChunkError, EnvelopeError, PeerError
from wire.messages import Need, Receipt, decode_body
from wire.primitives import SigningKey
from wire.topics import Topics
from wire.transport import Deliver, Packet, Received, TransportEvent
from wire.transport.memory import MemoryBroker, MemoryTransport

TOPICS = Topics("t", "f")
KEY = SigningKey.from_bytes(b"c" * 32)
SIGNERS = {KEY.key_id: Signer("", KEY.verify_key)}


@dataclass
class Narrow:
    """A transport that takes so many packets."""

    room: int
    taken: list[Packet] = field(default_factory=list)

    def start(self, deliver: Deliver, *, filters: object, will: Packet | None = None) -> None:
        return

    def stop(self, last_words: Packet | None = None) -> None:
        return

    def publish(self, packet: Packet) -> int:
        if self.room == 0:
            raise BackpressureError("full")
        self.room -= 1
        self.taken.append(packet)
        return len(self.taken)


def downlink(transport: Narrow, clock: VirtualTime) -> Downlink:
    return Downlink(topics=TOPICS, key=KEY, epoch=9, sender=Sender(transport), clock=clock, chunk_bytes=1024)


def receipt(number: int) -> Receipt:
    return Receipt(update_id=bytes([number]) * 16, transfer=b"t" * 32, verdict="stored")


def test_receipt_opens_for_its_device_and_for_no_other() -> None:
    transport, clock = Narrow(10), VirtualTime()
    down = downlink(transport, clock)
    down.send_receipt("dev", receipt(1))
    packet = transport.taken[0]
    assert packet.topic == TOPICS.by_device("ak", "dev")
    expect = Expect("down", "t", "f", "ak", "dev")
    opened = open_signed(packet.payload, signers=SIGNERS, expect=expect, now=clock.now(), limit_bytes=65_536)
    assert decode_body(opened.body, Receipt) == receipt(1)
    for wrong in (Expect("down", "t", "f", "ak", "other"), Expect("down", "t", "f", "cm", "dev")):
        with pytest.raises(EnvelopeError):
            open_signed(packet.payload, signers=SIGNERS, expect=wrong, now=clock.now(), limit_bytes=65_536)
    with pytest.raises(EnvelopeError):
        open_signed(
            packet.payload, signers=SIGNERS, expect=expect, now=clock.now() + 7200, limit_bytes=65_536
        )


def test_no_two_messages_share_a_number() -> None:
    transport, clock = Narrow(100), VirtualTime()
    down = downlink(transport, clock)
    for number in range(20):
        down.send_receipt("dev", receipt(number))
    expect = Expect("down", "t", "f", "ak", "dev")
    headers = [
        open_signed(
            packet.payload, signers=SIGNERS, expect=expect, now=clock.now(), limit_bytes=65_536
        ).header
        for packet in transport.taken
    ]
    assert len({(header.epoch, header.seq) for header in headers}) == 20
    assert {header.epoch for header in headers} == {9}


def test_bitmap_for_content_that_is_not_on_offer_is_refused() -> None:
    down = downlink(Narrow(10), VirtualTime())
    with pytest.raises(ChunkError):
        down.answer_need("dev", Need(sha256=b"x" * 32, bitmap=b"\x01"))


# ---- one device cannot flood the others --------------------------------------------------------------------

CHUNKS = 40
CONTENT = bytes(range(256)) * 4 * CHUNKS
EVERYTHING = b"\xff" * (CHUNKS // 8)


class Air:
    """A cloud and one device that only listens, on the in-memory transport; what reaches it is counted."""

    def __init__(self) -> None:
        self.time = VirtualTime()
        self.broker = MemoryBroker(self.time)
        transport = MemoryTransport(self.broker, "aggregator", queue_packets=100_000)
        self.sender = Sender(transport)
        self.down = Downlink(
            topics=TOPICS, key=KEY, epoch=9, sender=self.sender, clock=self.time, chunk_bytes=1024
        )
        transport.start(lambda event: None, filters=[])
        self.heard: list[str] = []
        self.reasons: set[str] = set()
        MemoryTransport(self.broker, "listener").start(self.hear, filters=[("fl/1/t/f/bl/+/+", 1)])
        self.broker.pump()
        self.sha256 = self.down.publish_blob(CONTENT).sha256
        self.travel()
        assert len(self.heard) == CHUNKS

    def hear(self, event: TransportEvent) -> None:
        if isinstance(event, Received):
            self.heard.append(event.packet.topic)

    def ask(self, device: str, bitmap: bytes = EVERYTHING) -> bool:
        """Asks as a signed `nd` would; whether nothing was refused."""
        try:
            self.down.answer_need(device, Need(sha256=self.sha256, bitmap=bitmap))
        except PeerError as error:
            self.reasons.add(error.facts["reason"])
            return False
        finally:
            self.travel()
        return True

    def travel(self) -> None:
        self.sender.pump()
        self.broker.pump()

    def wait(self, seconds: float) -> None:
        self.time.advance_to(self.time.now() + seconds)


def test_device_that_asks_without_end_is_answered_within_its_budget() -> None:
    """Ten minutes of asking for all, ten times a second: without a budget 24,000 chunks would reach every device."""
    air = Air()
    refused = 0
    for _ in range(6000):
        air.wait(0.1)
        refused += not air.ask("liar")
    passes = DEVICE_BUDGET.burst + 600.0 * DEVICE_BUDGET.per_second
    assert len(air.heard) - CHUNKS <= passes * CHUNKS
    assert refused > 5000
    assert air.reasons == {"budget"}


def test_device_that_asks_after_a_flood_gets_all_it_lacks() -> None:
    air = Air()
    for _ in range(100):
        air.wait(1.0)
        air.ask("liar")
    air.wait(2.0)
    before = len(air.heard)
    assert air.ask("honest")
    assert len(air.heard) - before == CHUNKS


def test_many_devices_that_ask_without_end_are_answered_within_the_fleets_budget() -> None:
    air = Air()
    seconds = 300
    for second in range(seconds):
        air.wait(1.0)
        for number in range(30):
            air.ask(f"liar{(second + number) % 1000}")
    passes = FLEET_BUDGET.burst + seconds * FLEET_BUDGET.per_second
    assert len(air.heard) - CHUNKS <= passes * CHUNKS + 1


def test_small_blob_may_be_lost_many_times() -> None:
    air = Air()
    air.sha256 = air.down.publish_blob(b"small").sha256
    answered = 0
    for _ in range(40):
        air.wait(1.0)
        answered += air.ask("unlucky", b"\x01")
    assert answered == 40
    assert answered < DEVICE_BUDGET.burst * SMALL_BLOB_CHUNKS


def test_chunk_that_was_never_sent_costs_no_budget() -> None:
    """A head that leaves only on need: who asks first asks for everybody."""
    air = Air()
    air.sha256 = air.down.publish_blob(CONTENT[::-1], broadcast=False).sha256
    before = len(air.heard)
    assert air.ask("first")
    assert len(air.heard) - before == CHUNKS
    for _ in range(int(DEVICE_BUDGET.burst)):
        air.wait(1.0)
        assert air.ask("first")
