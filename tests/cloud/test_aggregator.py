"""What an aggregator does at a tick: one announcement for whatever was signed; presence outlives lost heartbeats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa

from cloud_server.aggregator import SILENT_SECONDS
from cloud_server.artefacts import Artefacts
from cloud_server.assembly import Assembled, Base, assemble, open_base
from cloud_server.db import schema
from cloud_server.db.engine import open_database
from cloud_server.influence import MAX_VOTES_PER_SECOND, WINDOW_SECONDS
from cloud_server.keys import CloudKeys
from cloud_server.metrics import refusal_reason as refused_label
from cloud_server.registry import add_device
from cloud_server.release.announcer import CHECK_SECONDS
from cloud_server.release.publish import Publisher
from cloud_server.rounds.given import GivenReceipts
from cloud_server.screening import Refusal
from cloud_server.strikes import StrikePolicy, strike
from edge_agent.settings import EdgeSettings
from fleet.virtual import VirtualTime
from tests.cloud.round_lab import Lab, Message
from tests.cloud.small_bundle import make_candidate, write_bundle
from wire import envelope
from wire.header import Header
from wire.messages import Announcement, Birth, InferenceReport, Need, Telemetry, decode_body, encode_body
from wire.primitives import SigningKey
from wire.transport import Packet, Received, TransportEvent
from wire.transport.memory import MemoryBroker, MemoryTransport


@dataclass
class Hall:
    """An aggregator without a run, and a device that listens for announcements."""

    base: Base
    cloud: Assembled
    time: VirtualTime
    broker: MemoryBroker
    announced: list[int] = field(default_factory=list)

    def tick(self, seconds: float = CHECK_SECONDS) -> None:
        self.time.advance_to(self.time.now() + seconds)
        self.cloud.aggregator.tick()
        self.broker.pump()

    def hear(self, event: TransportEvent) -> None:
        if isinstance(event, Received):
            key = self.base.keys.order.verify_key
            opened = envelope.open_signed(
                event.packet.payload,
                signers={key.key_id: envelope.Signer("", key)},
                expect=envelope.Expect("down", "t", "f", "md", "a"),
                now=self.time.now(),
                limit_bytes=65_536,
            )
            self.announced.append(decode_body(opened.body, Announcement).release_version)


@pytest.fixture
def hall(tmp_path: Path) -> Iterator[Hall]:
    time = VirtualTime()
    broker = MemoryBroker(time)
    keys = CloudKeys.from_seed(b"hall")
    base = open_base(open_database("sqlite://"), Artefacts.in_memory(), keys, time, tenant="t", fleet="f")
    cloud = assemble(base, MemoryTransport(broker, "aggregator"), tenant="t", fleet="f")
    opened = Hall(base, cloud, time, broker)
    with base.database.transaction() as connection:
        add_device(connection, "a", SigningKey.from_bytes(b"a" * 32).verify_key, now=time.now())
    cloud.aggregator.start(cloud.aggregator.handle)
    MemoryTransport(broker, "a").start(opened.hear, filters=[("fl/1/t/f/md/#", 1)])
    broker.pump()
    yield opened
    base.database.close()


def release(hall: Hall, publisher: Publisher, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    publisher.import_model(bundle)
    publisher.publish(publisher.propose_bundle(bundle).version)


# ---- announcements -----------------------------------------------------------------------------------------


def test_release_is_announced_once_whoever_signed_it(hall: Hall, tmp_path: Path) -> None:
    hall.tick()
    assert hall.announced == [0]  # which keys count: that is so before there is a release
    # Another object on the same store: as a command in another process.
    command = Publisher(hall.base.database, hall.base.artefacts, hall.base.repository, hall.time)
    release(hall, command, tmp_path)
    for _ in range(5):
        hall.tick()
    assert hall.announced == [0, 1]
    publisher = hall.base.publisher
    publisher.publish(publisher.propose(make_candidate(2), run="main", round_number=1, metrics={}).version)
    hall.tick()
    assert hall.announced == [0, 1, 2]
    command.rollback()
    hall.tick()
    assert hall.announced == [0, 1, 2, 1]
    assert hall.cloud.announcer.announced_total == 4


def test_key_that_a_command_replaced_is_announced_at_once(hall: Hall, tmp_path: Path) -> None:
    release(hall, hall.base.publisher, tmp_path)
    hall.tick()
    hall.base.repository.set_online_keys(b"{}")
    hall.tick()
    assert hall.announced == [1, 1]


def test_what_is_signed_again_before_it_expires_is_announced_once(hall: Hall, tmp_path: Path) -> None:
    release(hall, hall.base.publisher, tmp_path)
    hall.tick()
    hall.tick(0.6 * 86_400)
    hall.tick()
    hall.tick()
    assert hall.announced == [1, 1]


def test_store_that_is_away_does_not_end_the_aggregator(hall: Hall, caplog: pytest.LogCaptureFixture) -> None:
    hall.base.artefacts.delete("tuf/metadata/timestamp.json")
    hall.tick()
    hall.tick()
    assert "release_not_announced" in caplog.text
    assert hall.announced == []


# ---- presence ----------------------------------------------------------------------------------------------


def birth(status: str = "online") -> Birth:
    return Birth(
        status=status,  # type: ignore[arg-type]
        boot_id=bytes(16),
        agent_version="0.1.0",
        wire_versions=(1, 1),
        machine="x86_64",
        cores=1,
        memory_bytes=1,
        codecs=("int4",),
        release_version=0,
        release_sha256=b"",
    )


def heartbeat() -> Telemetry:
    return Telemetry(
        uptime_seconds=1.0,
        release_version=0,
        requests_total=0,
        errors_total=0,
        samples=0,
        labelled_samples=0,
        outbox=0,
        rss_bytes=0,
    )


def test_presence_survives_two_lost_heartbeats_and_ends_after_that(hall: Hall) -> None:
    longest = 1.2 * EdgeSettings().report.telemetry_seconds
    hall.cloud.aggregator.on_birth("a", birth())
    hall.tick(59.0)
    # Seen, and not noted: the note before is not a minute old.
    hall.cloud.aggregator.on_telemetry("a", heartbeat())
    hall.tick(3 * longest)
    assert list(hall.base.registry.present()) == ["a"]
    hall.tick(SILENT_SECONDS)
    assert not hall.base.registry.present()
    hall.cloud.aggregator.on_telemetry("a", heartbeat())
    assert list(hall.base.registry.present()) == ["a"]


def test_device_that_comes_back_unnoticed_is_sent_its_order_at_once(hall: Hall) -> None:
    """After a broker's death nobody was lost: a new session says that what was under way to it may be gone."""
    lab = Lab(devices=2)
    with hall.base.database.transaction() as connection:
        add_device(connection, "d00", SigningKey.from_bytes(b"d" * 32).verify_key, now=hall.time.now())
    aggregator = hall.cloud.aggregator
    aggregator.begin(lab.runner)
    lab.runner.tick()
    assert sorted(device for device, _ in lab.orders) == ["d00", "d01"]
    aggregator.on_birth("d00", birth())
    lab.runner.tick()
    assert len(lab.orders) == 2
    for _ in range(3):
        aggregator.on_telemetry("d00", heartbeat())
        aggregator.on_birth("d00", birth())
        lab.runner.tick()
    assert [device for device, _ in lab.orders[2:]] == ["d00"] * 3
    lab.deliver()
    aggregator.on_birth("d00", birth())
    lab.runner.tick()
    asked = [device for device, order in lab.orders if (order.kind, order.round_number) == ("train", 1)]
    assert asked.count("d00") == 4


# ---- what comes again --------------------------------------------------------------------------------------


def test_update_that_comes_again_is_answered_as_stored_unless_its_device_was_revoked(hall: Hall) -> None:
    lab = Lab(devices=3, goal=3)
    hall.cloud.aggregator.begin(lab.runner)
    lab.runner.tick()
    sent = {}
    for device, order in lab.orders[:2]:
        message = lab.devices[device].answer(order)
        assert isinstance(message, Message)
        receipt = lab.feed(device, order, message)
        assert receipt is not None
        assert receipt.verdict == "stored"
        sent[device] = receipt
    aggregator, (first, second) = hall.cloud.aggregator, sent
    assert aggregator.is_answered(first, sent[first].transfer)
    assert not aggregator.is_answered(second, sent[first].transfer)
    intake = lab.runner.intake
    asked = [(device, receipt.transfer) for device, receipt in sent.items()]
    again = dict(intake.answer_again([*asked, ("stranger", sent[first].transfer)]))
    assert {device: (each.update_id, each.verdict) for device, each in again.items()} == {
        device: (each.update_id, "duplicate") for device, each in sent.items()
    }
    with lab.database.transaction() as connection:
        connection.execute(
            sa.update(schema.devices).values(status="revoked").where(schema.devices.c.device == second)
        )
    assert [device for device, _ in intake.answer_again(asked)] == [first]


def test_repeats_of_a_turn_are_answered_once_and_after_the_writer_was_checked(hall: Hall) -> None:
    lab = Lab(devices=2)
    aggregator = hall.cloud.aggregator
    aggregator.begin(lab.runner)
    lab.runner.tick()
    device, order = lab.orders[0]
    message = lab.devices[device].answer(order)
    assert isinstance(message, Message)
    receipt = lab.feed(device, order, message)
    assert receipt is not None
    heard: list[Packet] = []

    def hear(event: TransportEvent) -> None:
        if isinstance(event, Received):
            heard.append(event.packet)

    MemoryTransport(hall.broker, device).start(hear, filters=[(f"fl/1/t/f/ak/{device}", 1)])
    for _ in range(5):
        aggregator.on_repeated(device, receipt.transfer)
    hall.broker.pump()
    assert heard == []
    hall.tick()
    assert len(heard) == 1


def test_receipts_that_are_remembered_are_so_many_and_the_oldest_goes() -> None:
    given = GivenReceipts(most=2)
    for number in range(3):
        given.note("a", bytes([number]), b"id%d" % number)
    given.note("a", bytes([1]), b"id1")
    given.note("b", bytes([1]), b"other")
    assert [given.find("a", bytes([number])) for number in range(3)] == [None, b"id1", None]
    assert (given.find("b", bytes([1])), len(given)) == (b"other", 2)


# ---- one device's part -------------------------------------------------------------------------------------


def judged(count: int) -> InferenceReport:
    return InferenceReport(
        release_version=0,
        requests=count,
        errors=0,
        latency_p50_seconds=0.001,
        latency_p99_seconds=0.002,
        confidence_mean=0.5,
        feedback_correct=0,
        feedback_total=count,
    )


def test_report_counts_for_what_one_device_can_have_done(hall: Hall) -> None:
    metrics = hall.cloud.metrics
    hall.cloud.aggregator.on_inference_report("a", judged(7))
    assert metrics.feedback.value(outcome="wrong") == 7
    hall.cloud.aggregator.on_inference_report("a", judged(2**53))
    assert metrics.feedback.value(outcome="wrong") == MAX_VOTES_PER_SECOND * WINDOW_SECONDS


def test_report_of_a_device_in_quarantine_does_not_count(hall: Hall) -> None:
    hall.base.registry.quarantine("a", "looked at")
    hall.cloud.aggregator.on_inference_report("a", judged(7))
    assert not hall.cloud.metrics.feedback.value(outcome="wrong")
    assert hall.cloud.aggregator.inference["a"] == judged(7)


def test_device_whose_probation_has_come_is_let_back_at_a_sweep(hall: Hall) -> None:
    policy = StrikePolicy(limit=1, probation_seconds=600.0)
    with hall.base.database.transaction() as connection:
        struck = strike(connection, "a", Refusal.NOT_FINITE, now=hall.time.now(), policy=policy)
    assert struck is not None
    assert struck.is_quarantined
    assert hall.base.registry.status("a") == "quarantined"
    hall.tick(300.0)
    assert hall.base.registry.status("a") == "quarantined"
    hall.tick(301.0)
    assert hall.base.registry.status("a") == "approved"


def test_request_above_the_budget_is_counted_as_such(hall: Hall) -> None:
    """Through the whole door: signed by the device, opened, and refused for what it asks."""
    ref = hall.cloud.downlink.publish_blob(bytes(1000))
    for seq in range(200):
        hall.time.advance_to(hall.time.now() + 1.1)
        header = Header(type="nd", direction="up", tenant="t", fleet="f", device="a", epoch=1, seq=seq)
        need = encode_body(Need(sha256=ref.sha256, bitmap=b"\x01"))
        message = envelope.sign(header, need, signer=SigningKey.from_bytes(b"a" * 32))
        topic = f"fl/1/t/f/nd/a/{ref.sha256.hex()}"
        hall.cloud.aggregator.handle(Received(Packet(topic, message)))
    refused = hall.cloud.aggregator.inbox.refused_total
    assert set(refused) == {"nd: budget"}
    assert refused_label("nd: budget") == "budget"
    assert 100 < refused["nd: budget"] < 200


def test_aggregator_counts_what_comes_and_goes(hall: Hall, tmp_path: Path) -> None:
    release(hall, hall.base.publisher, tmp_path)
    hall.tick()
    metrics = hall.cloud.metrics
    assert metrics.broker_connected.value() == 1
    assert metrics.broker_connections.value() == 1
    assert metrics.sent.value(type="md") == 1
    assert (metrics.sent_bytes.value(type="md") or 0) > 100
    hall.broker.cut("aggregator", for_seconds=10.0)
    hall.broker.pump()
    assert metrics.broker_connected.value() == 0
