"""The tables of `agent.db`, and what a connection must be told before it reads or writes them.

Laws of the file: the same statements in the same order make every database of a format, so that its tables begin at the
same pages (`salvage.py` counts on it); what a row says about data is inside of its sealed bytes, and its clear columns
are only those that a query asks for. Source: docs/architecture.md, "Data at rest".
"""

from __future__ import annotations

import sqlite3
from typing import Final

FORMAT_VERSION: Final = 3
PLAIN_FORMAT_VERSION: Final = 2
"""The last format whose rows lay in the clear; `conversion.py` seals it."""
PAGE_BYTES: Final = 4096
_FROM_SQLITE: Final = {"CREATE TABLE sqlite_sequence(name,seq)"}

SCHEMA: Final = (
    "CREATE TABLE format (version INTEGER NOT NULL)",
    # epoch, reserved_seq, time_floor, …
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value NOT NULL, sha256 BLOB NOT NULL) WITHOUT ROWID",
    # The large columns stand last: SQLite walks through all pages of a blob to reach what is behind it.
    # cloud_row: the number under which the cloud keeps an acknowledged update that is in no backup yet; else 0.
    """CREATE TABLE outbox (
        row INTEGER PRIMARY KEY AUTOINCREMENT, update_id BLOB NOT NULL UNIQUE, order_id BLOB NOT NULL,
        run TEXT NOT NULL, round_number INTEGER NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('up', 'ev')),
        state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', created REAL NOT NULL, deadline REAL NOT NULL,
        ended_at REAL NOT NULL DEFAULT 0, cloud_row INTEGER NOT NULL DEFAULT 0,
        at_rest_key_id TEXT NOT NULL DEFAULT '', sha256 BLOB NOT NULL, body BLOB NOT NULL)""",
    # A change of a row writes all of it again: what comes later than the body lies beside it.
    """CREATE TABLE sealings (
        row INTEGER PRIMARY KEY, transfer BLOB NOT NULL, kem_key_id BLOB NOT NULL, sealed BLOB NOT NULL)""",
    "CREATE INDEX outbox_by_state ON outbox (state, row)",
    "CREATE TABLE outbox_totals (state TEXT PRIMARY KEY, total INTEGER NOT NULL) WITHOUT ROWID",
    # window: sealed, and so is the label with it; labelled says only whether there is one.
    """CREATE TABLE samples (
        id INTEGER PRIMARY KEY AUTOINCREMENT, split TEXT NOT NULL CHECK (split IN ('train', 'val')),
        labelled INTEGER NOT NULL, created REAL NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL,
        consent TEXT NOT NULL DEFAULT '', at_rest_key_id TEXT NOT NULL DEFAULT '', sha256 BLOB NOT NULL,
        window BLOB NOT NULL)""",
    "CREATE TABLE tombstones (id INTEGER PRIMARY KEY, forgotten_at REAL NOT NULL)",
    """CREATE TABLE orders (
        order_id BLOB PRIMARY KEY, kind TEXT NOT NULL, run TEXT NOT NULL, round_number INTEGER NOT NULL,
        update_id BLOB, seen_at REAL NOT NULL)""",
    """CREATE TABLE windows (
        kind TEXT PRIMARY KEY, epoch INTEGER NOT NULL, highest INTEGER NOT NULL, bitmap INTEGER NOT NULL
        ) WITHOUT ROWID""",
    "CREATE INDEX samples_by_key ON samples (at_rest_key_id)",
)


def create(connection: sqlite3.Connection) -> None:
    """Makes the tables, in the transaction of the caller."""
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute("INSERT INTO format VALUES (?)", (FORMAT_VERSION,))


def version_of(connection: sqlite3.Connection) -> object:
    """What a database says of its format; an int where it is whole."""
    (version,) = connection.execute("SELECT max(version) FROM format").fetchone() or (None,)
    return version


def is_ours(connection: sqlite3.Connection) -> bool:
    """Whether the tables are those of this format."""
    made = [row[0] for row in connection.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")]
    return set(made) - _FROM_SQLITE == set(SCHEMA)
