"""Enrolment tokens in SQL: a hash of each secret, never the secret.

Laws of the file: each function is one statement of fact within a transaction that the caller owns. No policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.schema import tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One token. `secret_hash` is SHA-256 (hex) of the secret's raw bytes."""

    id: str
    secret_hash: str
    name: str
    uses_left: int
    approves: bool
    claimed_by: str = ""
    expires: float
    created: float


def insert_token(connection: Connection, row: TokenRow) -> None:
    connection.execute(sa.insert(tokens).values(**{name: getattr(row, name) for name in row.__slots__}))


def load_token(connection: Connection, token_id: str) -> TokenRow | None:
    """A token, held against other transactions until this one ends."""
    row = connection.execute(sa.select(tokens).where(tokens.c.id == token_id).with_for_update()).one_or_none()
    return None if row is None else TokenRow(**row._mapping)


def use_token(connection: Connection, token_id: str, device: str) -> bool:
    """Takes one use; False when none was left."""
    where = (tokens.c.id == token_id) & (tokens.c.uses_left > 0)
    values = {"uses_left": tokens.c.uses_left - 1, "claimed_by": device}
    return bool(connection.execute(sa.update(tokens).where(where).values(**values)).rowcount)


def delete_expired_tokens(connection: Connection, before: float) -> None:
    """Forgets tokens that ended before a time."""
    connection.execute(sa.delete(tokens).where(tokens.c.expires < before))
