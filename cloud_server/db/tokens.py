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
    """One token.

    Attributes:
        secret_hash: SHA-256 (hex) of the secret's raw bytes.
        name: the only name that it enrols; `cam-*` for every name that begins so; empty for any.
        uses: devices that it was made for.
        claimed_by: the device that it enrolled last.
        reclaimed: when somebody else showed it after it was spent; None: never.
    """

    id: str
    secret_hash: str
    name: str
    uses_left: int
    approves: bool
    claimed_by: str = ""
    expires: float
    created: float
    uses: int = 1
    reclaimed: float | None = None


def insert_token(connection: Connection, row: TokenRow) -> None:
    connection.execute(sa.insert(tokens).values(**{name: getattr(row, name) for name in row.__slots__}))


def load_token(connection: Connection, token_id: str, *, hold: bool = True) -> TokenRow | None:
    """A token; with `hold` no other transaction can change it until this one ends."""
    query = sa.select(tokens).where(tokens.c.id == token_id)
    row = connection.execute(query.with_for_update() if hold else query).one_or_none()
    return None if row is None else TokenRow(**row._mapping)


def load_promised_names(connection: Connection, now: float) -> set[str]:
    """The names that open tokens are for."""
    where = (tokens.c.name != "") & (tokens.c.uses_left > 0) & (tokens.c.expires >= now)
    return set(connection.execute(sa.select(tokens.c.name).where(where)).scalars())


def use_token(connection: Connection, token_id: str, device: str) -> bool:
    """Takes one use; False when none was left."""
    where = (tokens.c.id == token_id) & (tokens.c.uses_left > 0)
    values = {"uses_left": tokens.c.uses_left - 1, "claimed_by": device}
    return bool(connection.execute(sa.update(tokens).where(where).values(**values)).rowcount)


def note_reclaimed(connection: Connection, token_id: str, now: float) -> bool:
    """Marks a spent token that was claimed again; False when it was marked before."""
    where = (tokens.c.id == token_id) & tokens.c.reclaimed.is_(None)
    return bool(connection.execute(sa.update(tokens).where(where).values(reclaimed=now)).rowcount)


def delete_expired_tokens(connection: Connection, before: float) -> None:
    """Forgets tokens that ended before a time."""
    connection.execute(sa.delete(tokens).where(tokens.c.expires < before))
