"""Operators in SQL: a name, a role, and the hash of a token, never the token.

Laws of the file: each function is one statement of fact within a transaction that the caller owns. No policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.schema import operators


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRow:
    """One operator. `token_hash` is SHA-256 (hex) of the token's secret; `pseudonym` is what the audit chain says."""

    name: str
    role: str
    pseudonym: str
    token_hash: str
    created: float
    last_seen: float = 0.0


def insert_operator(connection: Connection, row: OperatorRow) -> None:
    connection.execute(sa.insert(operators).values(**{name: getattr(row, name) for name in row.__slots__}))


def load_operators(connection: Connection) -> list[OperatorRow]:
    """Every operator, by name."""
    query = sa.select(operators).order_by(operators.c.name)
    return [OperatorRow(**row._mapping) for row in connection.execute(query)]


def load_operator(connection: Connection, name: str) -> OperatorRow | None:
    row = connection.execute(sa.select(operators).where(operators.c.name == name)).one_or_none()
    return None if row is None else OperatorRow(**row._mapping)


def find_operator(connection: Connection, token_hash: str) -> OperatorRow | None:
    """Whose token has this hash."""
    row = connection.execute(sa.select(operators).where(operators.c.token_hash == token_hash)).one_or_none()
    return None if row is None else OperatorRow(**row._mapping)


def note_operator_seen(connection: Connection, name: str, now: float) -> None:
    connection.execute(sa.update(operators).where(operators.c.name == name).values(last_seen=now))


def delete_operator(connection: Connection, name: str) -> bool:
    """Removes an operator, whose token is worth nothing from then on; False when there is none."""
    return bool(connection.execute(sa.delete(operators).where(operators.c.name == name)).rowcount)
