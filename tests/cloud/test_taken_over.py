"""Two aggregators on one database: the one that was there first commits, signs and says nothing more."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_server.artefacts import Artefacts
from cloud_server.assembly import Assembled, Base, assemble, open_base
from cloud_server.db.engine import open_database
from cloud_server.keys import CloudKeys
from cloud_server.registry import add_device
from fleet.virtual import VirtualTime
from wire.errors import StorageError
from wire.messages import Birth
from wire.primitives import SigningKey
from wire.transport.memory import MemoryBroker, MemoryTransport

TENANT, FLEET = "acme", "watches"
BIRTH = Birth(status="online", boot_id=bytes(16), agent_version="1", wire_versions=(1, 1))


class Two:
    """One database and store, and an aggregator on them; `start` starts another."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'cloud.db'}"
        self.store = Artefacts.in_memory()
        self.time = VirtualTime()
        self.broker = MemoryBroker(self.time)
        self.keys = CloudKeys.from_seed(b"two aggregators")

    def start(self) -> tuple[Base, Assembled]:
        base = open_base(
            open_database(self.url), self.store, self.keys, self.time, tenant=TENANT, fleet=FLEET
        )
        cloud = assemble(base, MemoryTransport(self.broker, "aggregator"), tenant=TENANT, fleet=FLEET)
        return base, cloud


@pytest.fixture
def two(tmp_path: Path) -> Two:
    return Two(tmp_path)


def test_first_aggregator_ends_its_next_turn_when_a_second_took_over(two: Two) -> None:
    _, cloud = two.start()
    cloud.aggregator.tick()
    two.start()
    with pytest.raises(StorageError, match="taken over"):
        cloud.aggregator.tick()


def test_first_aggregator_notes_no_device_when_a_second_took_over(two: Two) -> None:
    base, _ = two.start()
    key = SigningKey.from_bytes(bytes(range(32)))
    with base.database.transaction() as connection:
        add_device(connection, "dev-1", key.verify_key, now=two.time.now())
    base.registry.note_birth("dev-1", BIRTH)
    base.registry.write_presence()
    second, _ = two.start()
    base.registry.note_lost("dev-1")
    with pytest.raises(StorageError, match="taken over"):
        base.registry.write_presence()
    assert second.registry.presence()["dev-1"].status == "online"


def test_first_aggregator_signs_no_release_when_a_second_took_over(two: Two) -> None:
    base, _ = two.start()
    two.start()
    before = base.repository.timestamp()
    with pytest.raises(StorageError, match="taken over"):
        base.publisher.publish(1)
    assert base.repository.timestamp() == before
