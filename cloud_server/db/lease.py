"""The lease of whoever writes: that it still lives, said in the database by a number that moves.

Laws of the file: no clock of one machine is compared with one of another: who waits measures, by its own monotonic
clock, how long the number stood still; a takeover is one statement, which changes nothing if anything moved meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.schema import fencing


@dataclass(frozen=True, slots=True)
class Lease:
    """Attributes:
    token: of whoever claimed last.
    beat: moves while it lives.
    seconds: how long it may stand still; 0: nobody holds the lease.
    """

    token: int
    beat: int
    seconds: float


def load_lease(connection: Connection) -> Lease:
    row = connection.execute(sa.select(fencing)).one()
    return Lease(int(row.token), int(row.beat), float(row.lease_seconds))


def renew_lease(connection: Connection, token: int, seconds: float) -> bool:
    """Moves the beat; false when somebody else has claimed since."""
    values = {"beat": fencing.c.beat + 1, "lease_seconds": seconds}
    return _update(connection, fencing.c.token == token, values)


def release_lease(connection: Connection, token: int) -> None:
    """The holder ends: who waits need not wait."""
    _update(connection, fencing.c.token == token, {"lease_seconds": 0.0})


def take_lease(connection: Connection, seen: Lease, seconds: float) -> int | None:
    """Claims the database if nothing moved since `seen`; the new fencing token, or None."""
    values = {"token": fencing.c.token + 1, "beat": 0, "lease_seconds": seconds}
    if not _update(connection, (fencing.c.token == seen.token) & (fencing.c.beat == seen.beat), values):
        return None
    return seen.token + 1


def _update(connection: Connection, where: sa.ColumnElement[bool], values: dict[str, object]) -> bool:
    return bool(connection.execute(sa.update(fencing).where(where).values(**values)).rowcount)
