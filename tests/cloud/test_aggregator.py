"""What an aggregator does at a tick: one announcement for whatever was signed; presence outlives lost heartbeats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloud_server.aggregator import SILENT_SECONDS
from cloud_server.artefacts import Artefacts
from cloud_server.assembly import Assembled, Base, assemble, open_base
from cloud_server.db.engine import open_database
from cloud_server.keys import CloudKeys
from cloud_server.registry import add_device
from cloud_server.release.announcer import CHECK_SECONDS
from cloud_server.release.publish import Publisher
from edge_agent.settings import EdgeSettings
from fleet.virtual import VirtualTime
from tests.cloud.small_bundle import make_candidate, write_bundle
from wire import envelope
from wire.messages import Announcement, Birth, Telemetry, decode_body
from wire.primitives import SigningKey
from wire.transport import Received, TransportEvent
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
    assert hall.announced == []
    # Another object on the same store: as a command in another process.
    command = Publisher(hall.base.database, hall.base.artefacts, hall.base.repository, hall.time)
    release(hall, command, tmp_path)
    for _ in range(5):
        hall.tick()
    assert hall.announced == [1]
    publisher = hall.base.publisher
    publisher.publish(publisher.propose(make_candidate(2), run="main", round_number=1, metrics={}).version)
    hall.tick()
    assert hall.announced == [1, 2]
    command.rollback()
    hall.tick()
    assert hall.announced == [1, 2, 1]
    assert hall.cloud.announcer.announced_total == 3


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
