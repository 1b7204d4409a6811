"""The audit chain in SQL: what happened, each entry bound to the one before it, and the heads that were signed.

Laws of the file: entries are only ever appended; entry n holds SHA-256 over (n, hash of n − 1, time, kind,
body), so a changed or missing entry is found and named; a body names devices and people by pseudonym, so that
erasing a name elsewhere leaves the chain whole. What makes a chain good is in `cloud_server/audit/check.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.schema import audit, audit_heads, meta
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

    @property
    def facts(self) -> Mapping[str, Any]:
        """The body, read."""
        found: Mapping[str, Any] = json.loads(self.body)
        return found


@dataclass(frozen=True, slots=True)
class HeadRow:
    """A signed head: that the chain had `seq` entries at a time, the last of them with `hash`.

    Attributes:
        incarnation: of the cloud that signed it; a restored one may sign another entry of the same number.
        key_id, signature: hex.
    """

    seq: int
    hash: str
    at: float
    incarnation: int
    key_id: str
    signature: str


def append_audit(connection: Connection, kind: str, at: float, body: Mapping[str, Any]) -> AuditEntry:
    """Adds one entry in the transaction of what it tells."""
    # Two writers of one PostgreSQL queue up at a row that is always there: a lock on the newest entry would
    # let the second one go on from an entry that is the newest no more. SQLite has one writer anyway.
    connection.execute(sa.select(meta.c.id).with_for_update())
    newest = sa.select(audit.c.seq, audit.c.hash).order_by(audit.c.seq.desc()).limit(1)
    last = connection.execute(newest).one_or_none()
    seq, prev = (1, FIRST_PREV) if last is None else (last.seq + 1, last.hash)
    text = json.dumps(dict(body), sort_keys=True, separators=(",", ":"), allow_nan=False)
    entry = AuditEntry(seq, prev, entry_hash(seq, prev, at, kind, text), at, kind, text)
    connection.execute(sa.insert(audit).values(**{name: getattr(entry, name) for name in entry.__slots__}))
    return entry


def load_audit(
    connection: Connection, *, after: int = 0, kind: str = "", limit: int = 0
) -> Iterator[AuditEntry]:
    """The entries after a number, in order; of one kind, and only so many, if given."""
    query = sa.select(audit).where(audit.c.seq > after).order_by(audit.c.seq)
    query = query.where(audit.c.kind == kind) if kind else query
    for row in connection.execute(query.limit(limit) if limit else query):
        yield AuditEntry(row.seq, row.prev, row.hash, row.at, row.kind, row.body)


def newest_entry(connection: Connection) -> AuditEntry | None:
    """The last entry; None in an empty chain."""
    row = connection.execute(sa.select(audit).order_by(audit.c.seq.desc()).limit(1)).one_or_none()
    return None if row is None else AuditEntry(row.seq, row.prev, row.hash, row.at, row.kind, row.body)


def verify_audit(connection: Connection) -> int:
    """Walks the whole chain and returns how many entries it has; signed heads are not looked at.

    Raises:
        StorageError: (disk or an intruder) names the first entry that is changed or missing (`seq`).
    """
    seq, prev = 0, FIRST_PREV
    for entry in load_audit(connection):
        seq += 1
        if entry.seq != seq:
            raise StorageError(f"audit entry {seq} is missing", seq=seq)
        if entry.prev != prev or entry.hash != entry_hash(seq, prev, entry.at, entry.kind, entry.body):
            raise StorageError(f"audit entry {seq} was changed", seq=seq)
        prev = entry.hash
    return seq


def entry_hash(seq: int, prev: str, at: float, kind: str, body: str) -> str:
    """What binds an entry to all before it: SHA-256, hex."""
    plain = json.dumps([seq, prev, at, kind, body], separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()


# ---- signed heads ------------------------------------------------------------------------------------------


def hold_chain(connection: Connection) -> int:
    """Keeps other writers out until the transaction ends; returns the cloud's incarnation."""
    return int(connection.execute(sa.select(meta.c.incarnation).with_for_update()).scalar_one())


def insert_head(connection: Connection, row: HeadRow) -> None:
    values = {name: getattr(row, name) for name in row.__slots__}
    connection.execute(sa.insert(audit_heads).values(**values))


def load_heads(connection: Connection, *, is_unwitnessed: bool = False) -> list[HeadRow]:
    """Every signed head, oldest first; only those that the witness does not have yet, if asked."""
    query = sa.select(audit_heads).order_by(audit_heads.c.seq)
    query = query.where(audit_heads.c.witnessed.is_(None)) if is_unwitnessed else query
    return [_head(row) for row in connection.execute(query)]


def newest_head(connection: Connection) -> HeadRow | None:
    """The head of the longest chain that was signed."""
    row = connection.execute(sa.select(audit_heads).order_by(audit_heads.c.seq.desc()).limit(1)).one_or_none()
    return None if row is None else _head(row)


def note_witnessed(connection: Connection, seq: int, now: float) -> None:
    """The witness has this head."""
    connection.execute(sa.update(audit_heads).where(audit_heads.c.seq == seq).values(witnessed=now))


def _head(row: Any) -> HeadRow:
    return HeadRow(**{name: getattr(row, name) for name in HeadRow.__slots__})
