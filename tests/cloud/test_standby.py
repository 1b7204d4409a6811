"""Who holds the lease, who waits for it, and what a process that lost it does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloud_server.artefacts import Artefacts
from cloud_server.db.engine import Database, open_database
from cloud_server.db.lease import Lease, load_lease, release_lease, renew_lease, take_lease
from cloud_server.keys import CloudKeys
from cloud_server.release.tuf_repository import TufRepository
from cloud_server.sender import Sender
from cloud_server.settings import BrokerSettings, CloudSettings, StorageSettings
from cloud_server.standby import Watch, check_standby, held_lease
from fleet.virtual import VirtualTime
from process.clock import SystemClock
from process.pulse import READY, Pulse
from wire.errors import ConfigurationError, StorageError
from wire.transport import Packet
from wire.transport.memory import MemoryBroker, MemoryTransport

PATIENCE_SECONDS = 60.0
SHARED = CloudSettings(
    storage=StorageSettings(database="postgresql+psycopg://shoal@db/shoal", artefacts="s3://bucket/fleet"),
    broker=BrokerSettings(kind="external", host="broker"),
)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(f"sqlite:///{tmp_path}/cloud.db")
    opened.migrate()
    yield opened
    opened.close()


def lease_of(database: Database) -> Lease:
    with database.read() as connection:
        return load_lease(connection)


# ---- the lease ---------------------------------------------------------------------------------------------


def test_lease_that_moved_cannot_be_taken(database: Database) -> None:
    holder = database.claim_writer()
    with database.transaction() as connection:
        assert renew_lease(connection, holder, 10.0)
    seen = lease_of(database)
    with database.transaction() as connection:
        renew_lease(connection, holder, 10.0)
        assert take_lease(connection, seen, 10.0) is None
    with database.transaction() as connection:
        assert take_lease(connection, load_lease(connection), 10.0) == holder + 1
        # The one before holds nothing any more, and takes nothing from the new one.
        assert not renew_lease(connection, holder, 10.0)
        release_lease(connection, holder)
    assert lease_of(database) == Lease(holder + 1, 0, 10.0)
    with pytest.raises(StorageError, match="taken over"):
        database.check_claim()


def test_of_two_who_wait_one_takes_over(database: Database) -> None:
    database.claim_writer()
    seen = lease_of(database)
    with database.transaction() as connection:
        taken = [take_lease(connection, seen, 10.0) for _ in range(2)]
    assert taken == [seen.token + 1, None]


def test_lease_is_over_when_its_beat_stood_still_for_so_long_by_our_own_clock() -> None:
    lease = Lease(token=4, beat=7, seconds=10.0)
    watch = Watch().look(lease, 100.0)
    assert not watch.look(lease, 109.9).has_ended(109.9)
    assert watch.look(lease, 110.0).has_ended(110.0)
    moved = watch.look(replace(lease, beat=8), 109.0)
    assert not moved.look(replace(lease, beat=8), 118.0).has_ended(118.0)


def test_lease_that_was_given_back_is_over_at_once() -> None:
    assert Watch().look(Lease(4, 7, 0.0), 100.0).has_ended(100.0)


def test_database_that_was_away_ends_nobodys_lease() -> None:
    lease = Lease(token=4, beat=7, seconds=10.0)
    watch = Watch().look(lease, 100.0).lost_sight()
    assert not watch.has_ended(500.0)
    assert not watch.look(lease, 500.0).has_ended(500.0)
    assert watch.look(lease, 500.0).has_ended(510.0)


def test_holder_renews_and_gives_back(database: Database) -> None:
    token = database.claim_writer()
    with held_lease(database, token, 0.05, is_alive=lambda: True, on_lost=lambda: None):
        before = lease_of(database)
        assert before.seconds == 0.05
        until = threading.Event()
        while lease_of(database).beat < before.beat + 3:
            until.wait(0.005)
    assert lease_of(database).seconds == 0.0


def test_loop_that_hangs_holds_no_lease(database: Database) -> None:
    token, asked = database.claim_writer(), threading.Event()

    def is_alive() -> bool:
        asked.set()
        return False

    with held_lease(database, token, 0.05, is_alive=is_alive, on_lost=lambda: None):
        beat = lease_of(database).beat
        for _ in range(3):
            asked.clear()
            assert asked.wait(PATIENCE_SECONDS)
        assert lease_of(database).beat == beat


def test_holder_that_was_taken_over_from_is_told_and_gives_nothing_back(database: Database) -> None:
    token, lost = database.claim_writer(), threading.Event()
    with held_lease(database, token, 0.05, is_alive=lambda: True, on_lost=lost.set):
        with database.transaction() as connection:
            taken = take_lease(connection, load_lease(connection), 10.0)
            while taken is None:
                taken = take_lease(connection, load_lease(connection), 10.0)
        assert lost.wait(PATIENCE_SECONDS)
    assert lease_of(database) == Lease(taken, 0, 10.0)


# ---- nothing leaves ----------------------------------------------------------------------------------------


def test_packets_of_a_process_that_was_taken_over_from_stay() -> None:
    broker = MemoryBroker(VirtualTime())
    transport = MemoryTransport(broker, "aggregator")
    sent: list[Packet] = []

    def refuse() -> None:
        raise StorageError("another aggregator has taken over")

    sender = Sender(transport, sent.append, may_send=refuse)
    with pytest.raises(StorageError):
        sender.send(Packet("fl/1/a/b/rd/now", b"x"))
    assert (sent, sender.backlog) == ([], 1)


def test_timestamp_of_a_process_that_was_taken_over_from_is_not_written() -> None:
    store, clock = Artefacts.in_memory(), VirtualTime()
    keys = CloudKeys.from_seed(b"standby")
    looks: list[str] = []

    def may_sign() -> None:
        looks.append("look")
        if len(looks) == 4:
            # Stopped after the roles were written, and taken over from meanwhile.
            raise StorageError("another aggregator has taken over")

    repository = TufRepository(store, keys, clock, may_sign=may_sign)
    repository.init(online_keys=keys.online_json(tenant="a", fleet="b"))
    before = repository.timestamp()
    with pytest.raises(StorageError):
        repository.set_authorities(b"pem")
    assert len(looks) == 4
    assert repository.timestamp() == before
    # Whoever goes on is not kept from it by what lies there.
    TufRepository(store, keys, clock).set_authorities(b"pem")
    assert repository.timestamp() != before


# ---- the command -------------------------------------------------------------------------------------------


def test_probe_says_that_it_stands_by() -> None:
    pulse = Pulse(SystemClock(), stale_seconds=60.0)
    assert pulse.answer(READY) == (503, "not ready")
    pulse.stand_by("waits")
    assert pulse.answer(READY) == (503, "standby")
    assert pulse.is_alive
    pulse.beat(is_ready=True)
    assert pulse.answer(READY) == (200, "ready")


def test_standby_of_what_is_on_one_machine_is_refused() -> None:
    check_standby(SHARED)
    for changed, option in (
        (replace_storage(database=""), "storage.database"),
        (replace_storage(artefacts=""), "storage.artefacts"),
        (CloudSettings(storage=SHARED.storage), "broker.kind"),
    ):
        with pytest.raises(ConfigurationError, match=option):
            check_standby(changed)


def replace_storage(*, database: str | None = None, artefacts: str | None = None) -> CloudSettings:
    storage = StorageSettings(
        database=SHARED.storage.database if database is None else database,
        artefacts=SHARED.storage.artefacts if artefacts is None else artefacts,
    )
    return CloudSettings(storage=storage, broker=SHARED.broker)
