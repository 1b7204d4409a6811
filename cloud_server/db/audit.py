"""The audit chain in SQL: what happened, each entry bound to the one before it.

Laws of the file: entries are only ever appended; entry n holds SHA-256 over (n, hash of n − 1, time, kind,
body), so a changed or missing entry is found and named; a body names devices by pseudonym, so that erasing a
name elsewhere leaves the chain whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.schema import audit, meta
from wire.errors import StorageError

FIRST_PREV = "0" * 64


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One entry. `body` is canonical JSON."""

    seq: int
    prev: str
    hash: str
    at: float
    kind: str
    body: str


def append_audit(connection: Connection, kind: str, at: float, body: Mapping[str, Any]) -> AuditEntry:
    """Adds one entry in the transaction of what it tells."""
    # Two writers of one PostgreSQL queue up at a row that is always there: a lock on the newest entry would
    # let the second one go on from an entry that is the newest no more. SQLite has one writer anyway.
    connection.execute(sa.select(meta.c.id).with_for_update())
    newest = sa.select(audit.c.seq, audit.c.hash).order_by(audit.c.seq.desc()).limit(1)
    last = connection.execute(newest).one_or_none()
    seq, prev = (1, FIRST_PREV) if last is None else (last.seq + 1, last.hash)
    text = json.dumps(dict(body), sort_keys=True, separators=(",", ":"), allow_nan=False)
    entry = AuditEntry(seq, prev, _hash(seq, prev, at, kind, text), at, kind, text)
    connection.execute(sa.insert(audit).values(**{name: getattr(entry, name) for name in entry.__slots__}))
    return entry


def load_audit(connection: Connection, *, after: int = 0) -> Iterator[AuditEntry]:
    """The entries after a number, in order."""
    query = sa.select(audit).where(audit.c.seq > after).order_by(audit.c.seq)
    for row in connection.execute(query):
        yield AuditEntry(row.seq, row.prev, row.hash, row.at, row.kind, row.body)


def verify_audit(connection: Connection) -> int:
    """Walks the whole chain and returns how many entries it has.

    Raises:
        StorageError: (disk or an intruder) names the first entry that is changed or missing (`seq`).
    """
    seq, prev = 0, FIRST_PREV
    for entry in load_audit(connection):
        seq += 1
        if entry.seq != seq:
            raise StorageError(f"audit entry {seq} is missing", seq=seq)
        if entry.prev != prev or entry.hash != _hash(seq, prev, entry.at, entry.kind, entry.body):
            raise StorageError(f"audit entry {seq} was changed", seq=seq)
        prev = entry.hash
    return seq


def _hash(seq: int, prev: str, at: float, kind: str, body: str) -> str:
    plain = json.dumps([seq, prev, at, kind, body], separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()
