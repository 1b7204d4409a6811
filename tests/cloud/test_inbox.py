"""The door that everything from an untrusted broker comes through: what is let in, what is counted, what is bounded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import pytest

from cloud_server.inbox import Inbox
from fleet.virtual import VirtualTime
from wire.chunks import split
from wire.envelope import Opened, Signer, seal, sign
from wire.header import Header
from wire.messages import Birth, Body, InferenceReport, Join, Need, Receipt, Telemetry, encode_body
from wire.primitives import KemPrivateKey, SigningKey
from wire.topics import Topics
from wire.transport import Packet

TOPICS = Topics("t", "f")
KEY, OTHER = SigningKey.from_bytes(b"d" * 32), SigningKey.from_bytes(b"o" * 32)
KEM = KemPrivateKey.from_bytes("x25519", b"k" * 32)
SLOT = 400_000


@dataclass
class Heard:
    """Takes down what the inbox hands on."""

    calls: list[tuple[str, str, Any]] = field(default_factory=list)
    answered: set[tuple[str, bytes]] = field(default_factory=set)

    def on_birth(self, device: str, birth: Birth) -> None:
        self.calls.append(("birth", device, birth.status))

    def on_telemetry(self, device: str, telemetry: Telemetry) -> None:
        self.calls.append(("telemetry", device, telemetry.requests_total))

    def on_clock(self, device: str, told: float) -> None:
        self.calls.append(("clock", device, told))

    def on_inference_report(self, device: str, report: InferenceReport) -> None:
        self.calls.append(("report", device, report.requests))

    def on_join(self, device: str, join: Join) -> None:
        self.calls.append(("join", device, join.accepted))

    def on_need(self, device: str, need: Need) -> None:
        self.calls.append(("need", device, need.bitmap))

    def on_update(self, device: str, opened: Opened, transfer: bytes, size_bytes: int) -> None:
        self.calls.append(("update", device, opened.body))

    def is_answered(self, device: str, transfer: bytes) -> bool:
        return (device, transfer) in self.answered

    def on_repeated(self, device: str, transfer: bytes) -> None:
        self.calls.append(("repeated", device, transfer))

    def on_missing(self, device: str, receipt: Receipt) -> None:
        self.calls.append(("missing", device, receipt.missing))


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def inbox(heard: Heard) -> Inbox:
    signers = {KEY.key_id: Signer("dev", KEY.verify_key), OTHER.key_id: Signer("other", OTHER.verify_key)}
    return Inbox(
        topics=TOPICS,
        signers=lambda: signers,
        is_known=lambda device: device in ("dev", "other"),
        kem_keys={KEM.key_id: KEM},
        receiver=heard,
        clock=VirtualTime(),
        slot_bytes=SLOT,
    )


def header(kind: str, seq: int, device: str = "dev") -> Header:
    return Header(type=kind, direction="up", tenant="t", fleet="f", device=device, epoch=1, seq=seq)


def sealed(body: Body, seq: int, *, device: str = "dev", key: SigningKey = KEY) -> bytes:
    plain = encode_body(body)
    return seal(header(body.TYPE, seq, device), plain, signer=key, recipient=KEM.public_key, pad=True)


def birth(status: Any, boot: bytes = b"b" * 16) -> Birth:
    return Birth(status=status, boot_id=boot, agent_version="1", wire_versions=(1, 1))


def telemetry(requests: int) -> Telemetry:
    return Telemetry(
        uptime_seconds=1.0,
        release_version=1,
        requests_total=requests,
        errors_total=0,
        samples=0,
        labelled_samples=0,
        outbox=0,
    )


def test_inbox_hands_on_what_an_enrolled_device_says(inbox: Inbox, heard: Heard) -> None:
    online = sign(header("st", 1), encode_body(birth("online")), signer=KEY)
    inbox.receive(Packet(TOPICS.by_device("st", "dev"), online))
    inbox.receive(Packet(TOPICS.by_device("tm", "dev"), sealed(telemetry(7), 2)))
    assert heard.calls == [("birth", "dev", "online"), ("telemetry", "dev", 7)]
    assert not inbox.refused_total


def test_inbox_refuses_what_a_device_sealed_without_padding(inbox: Inbox, heard: Heard) -> None:
    """Its length would say what it says; counted, and nothing more (5.6)."""
    plain = encode_body(telemetry(7))
    bare = seal(header("tm", 1), plain, signer=KEY, recipient=KEM.public_key)
    inbox.receive(Packet(TOPICS.by_device("tm", "dev"), bare))
    assert heard.calls == []
    assert inbox.refused_total == {"tm: padding": 1}
    inbox.receive(Packet(TOPICS.by_device("tm", "dev"), sealed(telemetry(7), 1)))
    assert heard.calls == [("telemetry", "dev", 7)]


def test_inbox_ignores_a_retained_birth_that_comes_again(inbox: Inbox, heard: Heard) -> None:
    packet = Packet(
        TOPICS.by_device("st", "dev"), sign(header("st", 1), encode_body(birth("online")), signer=KEY)
    )
    inbox.receive(packet)
    inbox.receive(packet)
    assert len(heard.calls) == 1
    assert not inbox.refused_total


def test_inbox_hears_a_last_will_that_is_behind_the_window(inbox: Inbox, heard: Heard) -> None:
    topic = TOPICS.by_device("st", "dev")
    inbox.receive(Packet(topic, sign(header("st", 500), encode_body(birth("online")), signer=KEY)))
    inbox.receive(Packet(topic, sign(header("st", 1), encode_body(birth("lost")), signer=KEY)))
    assert [call[2] for call in heard.calls] == ["online", "lost"]


def test_inbox_refuses_a_replay_and_goes_on(inbox: Inbox, heard: Heard) -> None:
    packet = Packet(TOPICS.by_device("tm", "dev"), sealed(telemetry(7), 2))
    inbox.receive(packet)
    inbox.receive(packet)
    inbox.receive(Packet(TOPICS.by_device("tm", "dev"), sealed(telemetry(8), 3)))
    assert [call[2] for call in heard.calls] == [7, 8]
    assert inbox.refused_total == {"tm: seen": 1}


def test_inbox_refuses_a_device_that_speaks_under_another_name(inbox: Inbox, heard: Heard) -> None:
    theft = sealed(telemetry(7), 2, device="other", key=KEY)
    inbox.receive(Packet(TOPICS.by_device("tm", "other"), theft))
    inbox.receive(Packet(TOPICS.by_device("tm", "other"), sealed(telemetry(7), 2)))
    assert heard.calls == []
    assert inbox.refused_total.total() == 2


@pytest.mark.parametrize(
    "topic",
    ["fl/2/t/f/tm/dev", "fl/1/t/f/xx/dev", "fl/1/t/f/ak/dev", "fl/1/t/other/tm/dev", "", "fl/1/t/f/up/0/dev"],
)
def test_inbox_counts_a_topic_that_is_not_ours(topic: str, inbox: Inbox, heard: Heard) -> None:
    inbox.receive(Packet(topic, b"x"))
    assert heard.calls == []
    assert inbox.refused_total.total() == 1


@pytest.mark.parametrize("payload", [b"", b"\x00", b"garbage" * 100, bytes(70_000)])
@pytest.mark.parametrize("kind", ["st", "tm", "jn", "ir"])
def test_inbox_drops_bytes_that_are_no_message(kind: str, payload: bytes, inbox: Inbox, heard: Heard) -> None:
    inbox.receive(Packet(TOPICS.by_device(kind, "dev"), payload))
    assert heard.calls == []
    assert inbox.refused_total.total() == (1 if payload else 0)


def test_inbox_puts_an_update_together_in_any_order_and_asks_for_what_is_missing(
    inbox: Inbox, heard: Heard
) -> None:
    body = bytes(range(256)) * 1000
    message = seal(header("up", 5), body, signer=KEY, recipient=KEM.public_key, pad=True)
    chunks = split(message, 65_536)
    assert len(chunks) == 4
    for index in (0, 2, 3):
        inbox.receive(Packet(TOPICS.upload("0", "dev", 1, index), chunks[index]))
    assert heard.calls == [("missing", "dev", (1,))]
    inbox.receive(Packet(TOPICS.upload("0", "dev", 1, 1), chunks[1]))
    assert heard.calls[1:] == [("update", "dev", body)]


def test_transfer_that_has_its_receipt_is_neither_gathered_nor_opened(inbox: Inbox, heard: Heard) -> None:
    message = bytes(200_000)  # would not open
    chunks, transfer = split(message, 65_536), hashlib.sha256(message).digest()
    heard.answered = {("dev", transfer), ("stranger", transfer)}
    for device in ("dev", "stranger"):
        for index, chunk in enumerate(chunks):
            inbox.receive(Packet(TOPICS.upload("0", device, 1, index), chunk))
    assert heard.calls == [("repeated", "dev", transfer)]
    assert (inbox.open_transfers, inbox.granted_bytes) == (0, 0)
    assert inbox.refused_total == {"up: ChunkError": len(chunks)}
    inbox.receive(Packet(TOPICS.upload("0", "other", 1, 0), chunks[0]))  # whose it is not
    assert inbox.open_transfers == 1


def test_inbox_takes_no_chunk_of_a_stranger_or_above_the_slot(inbox: Inbox, heard: Heard) -> None:
    large = split(bytes(SLOT + 1), 65_536)
    inbox.receive(Packet(TOPICS.upload("0", "stranger", 1, 0), split(bytes(1000), 65_536)[0]))
    inbox.receive(Packet(TOPICS.upload("0", "dev", 1, 0), large[0]))
    assert heard.calls == []
    assert inbox.refused_total == {"up: ChunkError": 2}


def test_inbox_keeps_open_updates_inside_one_budget(
    inbox: Inbox, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_server.inbox.ASSEMBLY_BYTES", 300_000)
    bodies = {"dev": KEY, "other": OTHER}
    messages = {
        device: seal(header("up", 1, device), bytes(200_000), signer=key, recipient=KEM.public_key, pad=True)
        for device, key in bodies.items()
    }
    chunks = {device: split(message, 65_536) for device, message in messages.items()}
    inbox.receive(Packet(TOPICS.upload("0", "dev", 1, 0), chunks["dev"][0]))
    for index, chunk in enumerate(chunks["other"]):
        inbox.receive(Packet(TOPICS.upload("0", "other", 1, index), chunk))
    assert [call[:2] for call in heard.calls] == [("update", "other")]
    # The first sender's beginning gave way: it is asked for, and then its update is whole.
    for index in range(1, len(chunks["dev"])):
        inbox.receive(Packet(TOPICS.upload("0", "dev", 1, index), chunks["dev"][index]))
    assert heard.calls[-1] == ("missing", "dev", (0,))
    inbox.receive(Packet(TOPICS.upload("0", "dev", 1, 0), chunks["dev"][0]))
    assert heard.calls[-1][:2] == ("update", "dev")
