"""The virtual disk: after a commit that was cut, SQLite finds the state before it or after it, and nothing else."""

from __future__ import annotations

import os
import random
import sqlite3
from pathlib import Path

import pytest

from edge_agent.store.disk import write_durably
from fleet.chaos.disk import Disk, mounted
from fleet.chaos.faults import Fault
from fleet.chaos.injector import Crash, Injector
from fleet.chaos.sqlite import CuttableConnection

POINT = "commit"


def make_disk(folder: Path, *faults: Fault) -> Disk:
    injector = Injector(faults, lambda: 0.0, lambda: True)
    injector.arm(0)
    return Disk(
        "node",
        folder,
        injector,
        database="agent.db",
        name_commit=lambda changes: POINT if ("INSERT", "rows") in changes else "",
        name_file=lambda operation, path: f"file.{operation}",
        committed=lambda connection, changes: None,
    )


def opened(disk: Disk, *, durable: bool = True) -> CuttableConnection:
    connection = disk.connect(disk.database, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    connection.execute("CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY, body BLOB)")
    return connection


def insert(connection: sqlite3.Connection, body: bytes) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO rows (body) VALUES (?)", (body,))
    connection.execute("COMMIT")


def bodies(disk: Disk) -> list[bytes]:
    connection = sqlite3.connect(disk.database)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    found = [row[0] for row in connection.execute("SELECT body FROM rows ORDER BY id")]
    connection.close()
    return found


@pytest.mark.parametrize("kind", ["crash_before", "crash_torn", "crash_after"])
@pytest.mark.parametrize("pages", [3, 400])
def test_database_after_a_cut_commit_is_as_before_or_as_after_it(
    tmp_path: Path, kind: str, pages: int
) -> None:
    survived = set()
    for seed in range(24):
        folder = tmp_path / f"{kind}-{seed}"
        folder.mkdir()
        disk = make_disk(folder, Fault(0, 0, "later", kind, seed))
        disk._name_commit = lambda changes: ""
        connection = opened(disk)
        # Enough before it that some of these commits begin the log anew, or end in a checkpoint.
        before = [bytes([n]) * 4096 * (pages // 3) for n in range(1 + seed % 4)]
        for body in before:
            insert(connection, body)
        disk._name_commit = lambda changes: "later" if changes else ""
        last = b"last" * 2048
        with pytest.raises(Crash):
            insert(connection, last)
        disk.come_back()
        found = bodies(disk)
        assert found in (before, [*before, last])
        survived.add(len(found) > len(before))
    assert survived == {"crash_before": {False}, "crash_after": {True}}.get(kind, {False, True})


def test_commit_that_was_not_synced_may_be_lost_and_is_never_torn(tmp_path: Path) -> None:
    lost = 0
    for seed in range(24):
        folder = tmp_path / str(seed)
        folder.mkdir()
        disk = make_disk(folder)
        connection = opened(disk)
        insert(connection, b"synced")
        connection.execute("PRAGMA synchronous = NORMAL")
        for body in (b"first", b"second"):
            insert(connection, body)
        disk.die(random.Random(seed))
        disk.come_back()
        found = bodies(disk)
        assert found in ([b"synced"], [b"synced", b"first"], [b"synced", b"first", b"second"])
        lost += len(found) < 3
    assert 0 < lost < 24


def test_file_that_was_not_synced_may_be_torn_and_one_that_was_is_whole(tmp_path: Path) -> None:
    disk = make_disk(tmp_path)
    torn = 0
    with mounted({"node": disk}):
        for seed in range(16):
            (tmp_path / "careless").write_bytes(b"x" * 1000)
            write_durably(tmp_path / "careful", b"y" * 1000)
            disk.die(random.Random(seed))
            disk.come_back()
            torn += (tmp_path / "careless").stat().st_size < 1000
            assert (tmp_path / "careful").read_bytes() == b"y" * 1000
    assert 0 < torn < 16


def test_dead_node_changes_nothing_any_more(tmp_path: Path) -> None:
    disk = make_disk(tmp_path)
    connection = opened(disk)
    insert(connection, b"one")
    with mounted({"node": disk}):
        disk.die(random.Random(0))
        with pytest.raises(Crash):
            write_durably(tmp_path / "late", b"too late")
        with pytest.raises(Crash):
            insert(connection, b"two")
        assert not (tmp_path / "late").exists()
        disk.come_back()
        write_durably(tmp_path / "late", b"in time")
    assert bodies(disk) == [b"one"]
    assert os.fsync.__module__ == "posix"
