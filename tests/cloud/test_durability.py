"""What a receipt promises beyond the commit: that a backup holds the update, once one does and not before."""

from __future__ import annotations

import itertools
from pathlib import Path

import sqlalchemy as sa

from cloud_server.backup.backup import make_backup, restore_backup
from cloud_server.db.durability import Promise, newest_promise, note_backup, number_update
from cloud_server.db.schema import meta
from cloud_server.deployment import Deployment, initialise
from cloud_server.settings import CloudSettings
from edge_agent.uplink.hearing import RESTORED_EPOCHS
from tests.cloud.deployment import SteppedClock
from tests.cloud.round_lab import Lab


def store(cloud: Deployment) -> Promise:
    with cloud.database.transaction() as connection:
        return number_update(connection)


def test_receipts_promise_nothing_before_the_first_backup_and_then_what_it_holds(tmp_path: Path) -> None:
    clock = SteppedClock()
    with initialise(tmp_path / "state", CloudSettings(), clock=clock) as cloud:
        assert [store(cloud) for _ in range(3)] == [Promise()] * 3
        make_backup(cloud, tmp_path / "first")
        assert store(cloud) == Promise(row=4, durable=3)
        make_backup(cloud, tmp_path / "second")
        assert store(cloud) == Promise(row=5, durable=4)
    restore_backup(tmp_path / "first", tmp_path / "restored", clock=clock)
    with Deployment.open(tmp_path / "restored", clock=clock) as restored:
        with restored.database.read() as connection:
            assert newest_promise(connection) == Promise(row=3, durable=3)
        assert store(restored) == Promise(row=4, durable=3)


def test_devices_can_tell_a_restored_cloud_from_one_that_starts_again(tmp_path: Path) -> None:
    clock = SteppedClock()
    with initialise(tmp_path / "state", CloudSettings(), clock=clock) as cloud:
        make_backup(cloud, tmp_path / "backup")
        epochs = [cloud.database.claim_writer() for _ in range(3)]
    assert all(0 < later - before < RESTORED_EPOCHS for before, later in itertools.pairwise(epochs))
    restored = restore_backup(tmp_path / "backup", tmp_path / "restored", clock=clock)
    assert restored.incarnation.fence - epochs[-1] >= RESTORED_EPOCHS


def test_older_backup_that_ends_later_takes_nothing_back(tmp_path: Path) -> None:
    with initialise(tmp_path / "state", CloudSettings(), clock=SteppedClock()) as cloud:
        for _ in range(5):
            store(cloud)
        with cloud.database.transaction() as connection:
            note_backup(connection, 5)
            note_backup(connection, 2)
            assert newest_promise(connection) == Promise(row=5, durable=5)


def test_receipt_names_the_row_and_how_far_backups_reach() -> None:
    lab = Lab(3, rounds=1)
    lab.runner.tick()
    with lab.database.transaction() as connection:
        connection.execute(sa.update(meta).values(update_number=41, durable_number=40))
    (first, order), (second, other), *_ = lab.inbox
    message = lab.devices[first].honest(order)
    stored = lab.send_up(first, message)
    assert (stored.verdict, stored.row, stored.durable) == ("stored", 42, 40)
    again = lab.send_up(second, lab.devices[second].honest(other))
    assert (again.row, again.durable) == (43, 40)
    with lab.database.transaction() as connection:
        note_backup(connection, 42)
    duplicate = lab.send_up(first, message)
    assert duplicate.verdict == "duplicate"
    assert (duplicate.row, duplicate.durable) == (43, 42), "not before the row that it has"
