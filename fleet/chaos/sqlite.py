"""SQLite's own driver and library, with commits that can be cut in two: what of a database survives a crash.

Laws of the file: the SQLite that runs is the product's (no other build, no shim); what a crash leaves is only what
SQLite's order of writing and syncing in WAL mode allows: frames of the log that were not synced may be there, be torn
or be missing, sector by sector; the header of a log that begins anew is synced before its first frame, and a checkpoint
syncs the log before it writes pages, and these before the log begins anew. Source: https://sqlite.org/wal.html,
https://sqlite.org/walformat.html; docs/architecture.md, "The simulation under faults".
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

SECTOR_BYTES = 512
WAL_HEADER_BYTES = 32
_CHANGES = re.compile(
    r"\s*(INSERT|REPLACE|UPDATE|DELETE)\b(?:\s+OR\s+\w+)?(?:\s+INTO|\s+FROM)?\s+\"?(\w+)", re.IGNORECASE
)
_SYNCHRONOUS = re.compile(r"\s*PRAGMA\s+synchronous\s*=\s*(\w+)", re.IGNORECASE)

Change = tuple[str, str]
"""A verb (`INSERT`, `UPDATE`, `DELETE`) and a table."""


def telling(changes: frozenset[Change], points: Sequence[tuple[Change, str]]) -> str:
    """The point of a commit, by the first of `points` that it changes; empty for a commit that is none."""
    return next((point for change, point in points if change in changes), "")


class CommitWatcher(Protocol):
    """Who decides what a commit meets, and learns that it is through."""

    def commit(
        self, connection: CuttableConnection, changes: frozenset[Change], do: Callable[[], None]
    ) -> None:
        """Does the commit, or does not."""
        ...

    def check_alive(self) -> None:
        """Raises `Crash` once the process that this belongs to is dead."""
        ...


class NotingCursor(sqlite3.Cursor):
    """Tells its connection what it changes."""

    connection: CuttableConnection

    def execute(self, sql: str, parameters: Any = (), /) -> NotingCursor:
        self.connection.before(sql)
        if sql == "COMMIT":
            self.connection.commit_by(lambda: super(NotingCursor, self).execute(sql))
            return self
        super().execute(sql, parameters)
        return self

    def executemany(self, sql: str, parameters: Any, /) -> NotingCursor:
        self.connection.before(sql)
        super().executemany(sql, parameters)
        return self


class CuttableConnection(sqlite3.Connection):
    """A connection whose commits go through a watcher.

    Attributes:
        owner: whose it is.
        is_durable: whether commits are synced (`PRAGMA synchronous = FULL`).
    """

    def __init__(
        self, watcher: CommitWatcher, database: str | Path, *, owner: object = None, **options: Any
    ) -> None:
        super().__init__(database, **options)
        self.owner = owner
        self._watcher = watcher
        self._changes: set[Change] = set()
        self.path = Path(database)
        self.is_durable = True

    def cursor(self, factory: Any = None) -> Any:
        """Always a noting one."""
        return super().cursor(NotingCursor)

    def execute(self, sql: str, parameters: Any = (), /) -> NotingCursor:
        """By a noting cursor; the driver's own would make a plain one."""
        cursor: NotingCursor = self.cursor()
        return cursor.execute(sql, parameters)

    def before(self, sql: str) -> None:
        """Takes note of a statement before it runs."""
        self._watcher.check_alive()
        if found := _CHANGES.match(sql):
            self._changes.add((found[1].upper(), found[2].lower()))
        elif found := _SYNCHRONOUS.match(sql):
            self.is_durable = found[1].upper() in ("FULL", "EXTRA", "2", "3")
        elif sql.startswith(("BEGIN", "ROLLBACK")):
            self._changes.clear()

    def commit(self) -> None:
        if self.in_transaction:
            self.commit_by(super().commit)

    def commit_by(self, do: Callable[[], Any]) -> None:
        """Commits by way of the watcher."""
        self._watcher.check_alive()
        changes, self._changes = frozenset(self._changes), set()
        self._watcher.commit(self, changes, lambda: _nothing(do()))


def disk_full() -> sqlite3.OperationalError:
    """The driver's own error of a full disk."""
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    error.sqlite_errorname = "SQLITE_FULL"
    return error


def read_database(path: Path) -> tuple[bytes, bytes]:
    """The bytes of a database and of its log."""
    return _bytes_of(path), _bytes_of(_log_of(path))


def write_database(path: Path, image: tuple[bytes, bytes]) -> None:
    """Puts what survived in place; the index of the log never survives a crash and is made anew."""
    path.write_bytes(image[0])
    log = _log_of(path)
    log.unlink(missing_ok=True)
    if image[1]:
        log.write_bytes(image[1])
    path.with_name(path.name + "-shm").unlink(missing_ok=True)


def torn_commit(
    before: tuple[bytes, bytes], after: tuple[bytes, bytes], rng: random.Random
) -> tuple[bytes, bytes]:
    """What is on the disk when the power goes in the middle of one synced commit.

    Args:
        before, after: database and log as they were synced before it, and with all of its writes.
    """
    (old_pages, old_log), (new_pages, new_log) = before, after
    if new_pages != old_pages:
        # The commit was followed by a checkpoint: the log is synced, its pages are on their way.
        pages = _mixed(old_pages, new_pages, 0, rng)
        return pages, new_log
    if old_log[:WAL_HEADER_BYTES] == new_log[:WAL_HEADER_BYTES]:
        return old_pages, _mixed(old_log, new_log, len(old_log), rng)
    # The log begins anew: its header was synced before its first frame.
    return old_pages, new_log[:WAL_HEADER_BYTES] + _mixed(old_log, new_log, WAL_HEADER_BYTES, rng)[
        WAL_HEADER_BYTES:
    ]


def lose_unsynced(image: tuple[bytes, bytes], synced_bytes: int, rng: random.Random) -> tuple[bytes, bytes]:
    """What is left of frames that no sync has followed.

    Args:
        synced_bytes: length of the log at its last sync.
    """
    pages, log = image
    start = min(synced_bytes, len(log))
    return pages, _mixed(log[:start], log, start, rng)


def _mixed(old: bytes, new: bytes, start: int, rng: random.Random) -> bytes:
    """`new` of which, from `start` on, some sectors were not written: none, a beginning, or any of them."""
    way = rng.random()
    if way < 0.2:
        return old
    sectors = range(start, len(new), SECTOR_BYTES)
    if way < 0.6:
        kept = set(sectors[: rng.randrange(len(sectors) + 1)])
    else:
        kept = {sector for sector in sectors if rng.random() < 0.5}
    made = bytearray(old[: len(new)].ljust(len(new), b"\0"))
    for sector in kept:
        made[sector : sector + SECTOR_BYTES] = new[sector : sector + SECTOR_BYTES]
    end = max(kept, default=start - SECTOR_BYTES) + SECTOR_BYTES
    return bytes(made[: max(len(old), min(end, len(new)))])


def _bytes_of(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _nothing(_: object) -> None:
    return None
