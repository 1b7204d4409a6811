"""What can still be read of a damaged database goes into the fresh one: a broken page must not cost what is
owed.

Laws of the file: best effort, never raises for damage, bounded by the file that was there; rows are copied as
they are, because their readers compare each with its digest. Numbers of messages are never taken over: the
fresh database has an epoch of its own.
"""

from __future__ import annotations

import contextlib
import io
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

# Most needed first: the fresh database has the same cap and may run full.
TABLES: Final = ("outbox", "outbox_totals", "tombstones", "orders", "windows", "facts", "sealings", "samples")
# The numbers of messages: the fresh database must not go on with them.
_LEFT_BEHIND: Final = {"facts": "WHERE name NOT IN ('epoch', 'reserved_seq')"}

# SQLite's file format, §1.3: the header's size in pages, and the head and length of the list of free pages.
_PAGE_BYTES: Final = 4096
_SIZE_AT: Final = 28
_FREE_LIST_AT: Final = 32


def salvage(damaged: Path, fresh: sqlite3.Connection) -> dict[str, int]:
    """Copies rows into an open connection, in one transaction.

    Returns:
        Rows copied, by table.
    """
    copied = dict.fromkeys(TABLES, 0)
    page = None if _has_our_schema(damaged, fresh) else _first_page_of(fresh, damaged.stat().st_size)
    with (
        _first_page(damaged, page),
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(_open(damaged)) as source,
    ):
        fresh.execute("BEGIN IMMEDIATE")
        for table in TABLES:
            copied[table] = _copy(source, fresh, table)
        _name_lost_updates(source, fresh)
        fresh.execute("COMMIT")
    return copied


def _open(damaged: Path) -> sqlite3.Connection:
    source = sqlite3.connect(damaged, isolation_level=None)
    source.text_factory = lenient_text
    return source


def _has_our_schema(damaged: Path, fresh: sqlite3.Connection) -> bool:
    sql = "SELECT sql FROM sqlite_schema ORDER BY name"
    with contextlib.closing(_open(damaged)) as source:
        return list(_rows(source, sql)) == list(_rows(fresh, sql))


def _first_page_of(fresh: sqlite3.Connection, file_bytes: int) -> bytes:
    """The first page of a fresh database, the schema, made to fit a file of that size.

    All databases are made by the same statements in the same order, so their tables begin at the same pages.
    """
    page = bytearray(fresh.serialize()[:_PAGE_BYTES])
    struct.pack_into(">I", page, _SIZE_AT, file_bytes // _PAGE_BYTES)
    struct.pack_into(">II", page, _FREE_LIST_AT, 0, 0)
    return bytes(page)


@contextlib.contextmanager
def _first_page(damaged: Path, page: bytes | None) -> Iterator[None]:
    """Lends a file another first page; afterwards it is as it was found, for the quarantine."""
    if page is None:
        yield
        return
    with damaged.open("r+b") as file:
        found = file.read(_PAGE_BYTES)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        file.write(page)
        file.flush()
        yield
        file.seek(0)
        file.write(found)
        file.truncate(size)


def lenient_text(raw: bytes) -> str:
    """Text as it is; a flipped bit makes one wrong value, not a query that fails for all rows."""
    return raw.decode("utf-8", "replace")


def _copy(source: sqlite3.Connection, fresh: sqlite3.Connection, table: str) -> int:
    columns = [row[1] for row in fresh.execute(f"PRAGMA table_info({table})")]
    insert = f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    copied = 0
    # From both ends: a broken page stops a scan, and hides only what lies behind it.
    for order in ("ASC", "DESC"):
        where = _LEFT_BEHIND.get(table, "")
        sql = f"SELECT {', '.join(columns)} FROM {table} {where} ORDER BY {columns[0]} {order}"
        for row in _rows(source, sql):
            # A value that breaks a rule of the table, or a fresh database that is full: the others go on.
            with contextlib.suppress(sqlite3.Error):
                copied += fresh.execute(insert, row).rowcount
    return copied


def _name_lost_updates(source: sqlite3.Connection, fresh: sqlite3.Connection) -> None:
    """Updates whose rows lie in a broken page, as far as the indexes know them.

    They come back without a body or a digest, so that the outbox finds them damaged and counts them as
    `destroyed`: no id goes without an end.
    """
    states = dict(_rows(source, "SELECT row, state FROM outbox INDEXED BY outbox_by_state"))
    ids = _rows(source, "SELECT update_id, row FROM outbox INDEXED BY sqlite_autoindex_outbox_1")
    for update_id, row in ids:
        with contextlib.suppress(sqlite3.Error):
            fresh.execute(
                "INSERT OR IGNORE INTO outbox (row, update_id, order_id, run, round_number, kind, body, sha256,"
                " state, created, deadline) VALUES (?, ?, x'', '', 0, 'up', x'', x'', ?, 0, 0)",
                (row, update_id, states.get(row, "open")),
            )


def _rows(source: sqlite3.Connection, sql: str) -> Iterator[tuple[Any, ...]]:
    with contextlib.suppress(sqlite3.Error, UnicodeDecodeError, OverflowError, MemoryError):
        yield from source.execute(sql)
