"""What the cloud says opens for the one that it is meant for, and for nobody else."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cloud_server.downlink import Downlink
from cloud_server.sender import Sender
from fleet.virtual import VirtualTime
from wire.envelope import Expect, Signer, open_signed
from wire.errors import BackpressureError, ChunkError, EnvelopeError
from wire.messages import Need, Receipt, decode_body
from wire.primitives import SigningKey
from wire.topics import Topics
from wire.transport import Deliver, Packet

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
        down.answer_need(Need(sha256=b"x" * 32, bitmap=b"\x01"))
