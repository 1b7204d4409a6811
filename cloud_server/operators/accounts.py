"""Operators and their tokens: made, recognised, removed.

Laws of the file: a token is shown once and only its hash is kept. SHA-256 is enough for that: the secret has 256
bits of the operating system's randomness, so there is no dictionary that a slow hash would have to slow down (a
person's password would need one, and there are none here). The last admin cannot be removed. The audit chain
names an operator by a pseudonym, which ends with his row.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from enum import StrEnum
from typing import Final

from cloud_server.db import operators as table
from cloud_server.db.audit import append_audit
from cloud_server.db.engine import Connection, Database
from cloud_server.db.operators import OperatorRow
from process.clock import Clock
from wire.errors import ConfigurationError
from wire.topics import ID

TOKEN_PREFIX: Final = "shoal-operator-"
FIRST_ADMIN: Final = "admin"
SESSION_SECONDS: Final = 3600.0
"""After so long without a request the next one is a login in the audit chain."""
_SECRET_BYTES: Final = 32
_TOKEN: Final = re.compile(TOKEN_PREFIX + r"[A-Za-z0-9_-]{43}")


class Role(StrEnum):
    """What an operator may do; each may all that those before it may."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def includes(self, other: Role) -> bool:
        """Whether this role may what the other may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


def add_operator(connection: Connection, name: str, role: Role, now: float) -> str:
    """Makes an operator, in the caller's transaction; returns the token, which is not kept.

    Raises:
        ConfigurationError: (operator) the name is none, or is taken.
    """
    if not ID.fullmatch(name):
        raise ConfigurationError(
            f"{name[:80]!r} cannot be an operator's name", hint="use A-Z a-z 0-9 _ - (1 to 64)"
        )
    if table.load_operator(connection, name) is not None:
        raise ConfigurationError(
            f"there is an operator {name} already",
            hint="a lost token: remove the operator, and add him again",
        )
    token = TOKEN_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    row = OperatorRow(
        name=name,
        role=role,
        pseudonym=secrets.token_hex(16),
        token_hash=_hash(token),
        created=now,
    )
    table.insert_operator(connection, row)
    append_audit(connection, "operator.added", now, {"operator": row.pseudonym, "role": str(role)})
    return token


def remove_operator(connection: Connection, name: str, now: float) -> None:
    """Ends an operator's access, in the caller's transaction.

    Raises:
        ConfigurationError: (operator) there is none of this name, or he is the last admin.
    """
    row = table.load_operator(connection, name)
    if row is None:
        raise ConfigurationError(
            f"there is no operator {name[:80]!r}", hint="`shoal-cloud user list` names them all"
        )
    admins = [each.name for each in table.load_operators(connection) if each.role == Role.ADMIN]
    if admins == [name]:
        raise ConfigurationError(
            f"{name} is the last admin",
            hint="add another admin first: shoal-cloud user add NAME --role admin",
        )
    table.delete_operator(connection, name)
    append_audit(connection, "operator.removed", now, {"operator": row.pseudonym})


class Doorkeeper:
    """Tells whose token it is. Safe to use from many threads."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def recognise(self, token: str) -> OperatorRow | None:
        """The operator of a token; None for any other text. The first use after an hour of rest is a login in the audit
        chain."""
        if not _TOKEN.fullmatch(token):
            return None
        with self._database.read() as connection:
            row = table.find_operator(connection, _hash(token))
        if row is None:
            return None
        now = self._clock.now()
        if abs(now - row.last_seen) >= SESSION_SECONDS:
            with self._database.transaction() as connection:
                table.note_operator_seen(connection, row.name, now)
                append_audit(connection, "operator.login", now, {"operator": row.pseudonym})
        return row


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
