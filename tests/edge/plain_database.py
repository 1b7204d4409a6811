"""Writes `agent.db` as the version before kept it (format 2, in the clear), and dies without closing it.

Arguments: folder, the secret of every row (hex), how many more samples (with any, the database is closed).
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import struct
import sys

TABLES = """
CREATE TABLE format (version INTEGER NOT NULL);
CREATE TABLE facts (name TEXT PRIMARY KEY, value NOT NULL, sha256 BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE outbox (
    row INTEGER PRIMARY KEY AUTOINCREMENT, update_id BLOB NOT NULL UNIQUE, order_id BLOB NOT NULL,
    run TEXT NOT NULL, round_number INTEGER NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('up', 'ev')),
    state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', created REAL NOT NULL, deadline REAL NOT NULL,
    ended_at REAL NOT NULL DEFAULT 0, at_rest_key_id TEXT NOT NULL DEFAULT '', sha256 BLOB NOT NULL,
    body BLOB NOT NULL);
CREATE TABLE sealings (row INTEGER PRIMARY KEY, transfer BLOB NOT NULL, sealed BLOB NOT NULL);
CREATE INDEX outbox_by_state ON outbox (state, row);
CREATE TABLE outbox_totals (state TEXT PRIMARY KEY, total INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE samples (
    id INTEGER PRIMARY KEY AUTOINCREMENT, split TEXT NOT NULL CHECK (split IN ('train', 'val')),
    label INTEGER, created REAL NOT NULL, dtype TEXT NOT NULL, shape TEXT NOT NULL,
    consent TEXT NOT NULL DEFAULT '', at_rest_key_id TEXT NOT NULL DEFAULT '', sha256 BLOB NOT NULL,
    window BLOB NOT NULL);
CREATE TABLE tombstones (id INTEGER PRIMARY KEY, forgotten_at REAL NOT NULL);
CREATE TABLE orders (
    order_id BLOB PRIMARY KEY, kind TEXT NOT NULL, run TEXT NOT NULL, round_number INTEGER NOT NULL,
    update_id BLOB, seen_at REAL NOT NULL);
CREATE TABLE windows (
    kind TEXT PRIMARY KEY, epoch INTEGER NOT NULL, highest INTEGER NOT NULL, bitmap INTEGER NOT NULL
    ) WITHOUT ROWID;
INSERT INTO format VALUES (2);
"""


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def add_sample(connection: sqlite3.Connection, number: int, label: int | None, window: bytes) -> None:
    digest = sha256(f"float32\0008,16\0{label}\0train\0".encode(), window)
    connection.execute(
        "INSERT INTO samples (id, split, label, created, dtype, shape, sha256, window)"
        " VALUES (?, 'train', ?, 1.0, 'float32', '8,16', ?, ?)",
        (number, label, digest, window),
    )


def add_update(connection: sqlite3.Connection, number: int, body: bytes, stored: bytes, state: str) -> None:
    name = bytes([number]) * 16
    named = (name, name, b"run", struct.pack("<q", 1), b"up")
    digest = sha256(*(struct.pack("<I", len(part)) + part for part in named), body)
    connection.execute(
        "INSERT INTO outbox (update_id, order_id, run, round_number, kind, state, created, deadline, sha256, body)"
        " VALUES (?, ?, 'run', 1, 'up', ?, 1.0, 1e9, ?, ?)",
        (name, name, state, digest, stored),
    )


def write(connection: sqlite3.Connection, secret: bytes, samples: int) -> None:
    for name, value in (("epoch", 500), ("reserved_seq", 256)):
        digest = sha256(f"{name}\0int\0{value!r}".encode())
        connection.execute("INSERT INTO facts VALUES (?, ?, ?)", (name, value, digest))
    connection.execute("INSERT INTO facts VALUES ('error_feedback', ?, x'')", (secret,))
    add_sample(connection, 3, 2, secret)
    add_sample(connection, 7, None, secret)
    for number in range(100, 100 + samples):
        add_sample(connection, number, 1, secret)
    connection.execute("INSERT INTO tombstones VALUES (9, 1.0)")
    connection.execute("UPDATE sqlite_sequence SET seq = max(seq, 9) WHERE name = 'samples'")
    add_update(connection, 1, secret, secret, "open")
    add_update(connection, 2, secret, secret[:-1] + b"?", "open")
    add_update(connection, 3, secret, b"", "stored")
    connection.execute("INSERT INTO outbox_totals VALUES ('stored', 1)")
    connection.execute("INSERT INTO sealings VALUES (1, ?, ?)", (sha256(b"sealed"), b"sealed"))
    connection.execute("INSERT INTO windows VALUES ('cm', 4, 5, 1)")
    connection.execute("INSERT INTO orders VALUES (?, 'train', 'run', 1, NULL, 1.0)", (bytes(16),))


def main(folder: str, secret: bytes, samples: int) -> None:
    connection = sqlite3.connect(f"{folder}/agent.db", isolation_level=None)
    connection.execute("PRAGMA page_size = 4096")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(f"BEGIN; {TABLES}")
    write(connection, secret, samples)
    connection.execute("COMMIT")
    if samples:
        connection.close()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3]))
