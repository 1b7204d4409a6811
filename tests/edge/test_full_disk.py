"""A device that is started while its disk is full: it serves, says nothing, and goes on as soon as there is room."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edge_agent.release.memory_slots import MemorySlots
from edge_agent.store.outbox import Outbox
from edge_agent.store.storage import open_database
from tests.edge.lab import Lab, windows
from wire.errors import StorageError
from wire.messages import Birth

NAME = bytes(16)


class FullConnection(sqlite3.Connection):
    """Refuses every commit while the disk is full."""

    is_full = False

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if sql == "COMMIT" and FullConnection.is_full:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return super().execute(sql, parameters)


@pytest.fixture
def full() -> Iterator[type[FullConnection]]:
    yield FullConnection
    FullConnection.is_full = False


def test_agent_that_starts_on_a_full_disk_serves_and_joins_the_fleet_when_there_is_room(
    lab: Lab, tmp_path: Path, full: type[FullConnection]
) -> None:
    lab.cloud.release(lab.cloud.candidate(), 1)
    slots = MemorySlots(lab.shared)
    agent = lab.agent(database=open_database(tmp_path, clock=lab.time, connect=full), slots=slots)
    lab.run(60)
    agent.stop()
    lab.agents.clear()
    lab.broker.pump()
    heard = len(lab.cloud.of(Birth))
    full.is_full = True
    agent = lab.agent(database=open_database(tmp_path, clock=lab.time, connect=full), slots=slots)
    window = windows(lab.bundle, 1)[0][0]
    for _ in range(5):
        lab.run(60)
        assert agent.infer(window).release_version == 1
    assert len(lab.cloud.of(Birth)) == heard, "without a number on the disk nothing may be said"
    full.is_full = False
    lab.run(60)
    assert [one.body.status for one in lab.cloud.of(Birth)[heard:] if isinstance(one.body, Birth)] == [
        "online"
    ]
    agent.stop()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root may mount a disk")
def test_database_on_a_disk_without_a_page_left_opens_and_can_be_read(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        database = open_database(disk / "state")
        Outbox(database).put(NAME, NAME, "run", 1, "up", b"what is owed", 1.0, 1e12)
        database.close()
        filler = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
        with suppress(OSError):
            while os.write(filler, bytes(4096)):
                continue
        os.close(filler)
        database = open_database(disk / "state")
        assert [row.body for row in Outbox(database).pending()] == [b"what is owed"]
        with pytest.raises(StorageError):
            database.reserve_numbers(1)
        (disk / "filler").unlink()
        assert database.reserve_numbers(1)[1] == 1
        database.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_database_that_could_only_be_read_for_a_moment_is_written_again(tmp_path: Path) -> None:
    opened: list[str] = []

    def connect(path: Path, **options: Any) -> sqlite3.Connection:
        opened.append("ro" if not opened else "rw")
        made: sqlite3.Connection = sqlite3.connect(f"file:{path}?mode={opened[-1]}", uri=True, **options)
        return made

    open_database(tmp_path).close()
    database = open_database(tmp_path, connect=connect)
    with pytest.raises(StorageError, match="readonly"):
        database.set_fact("name", 1)
    database.set_fact("name", 2)
    assert database.fact("name") == 2
    database.close()
    assert opened == ["ro", "rw"]
