"""What a receipt promises beyond the commit: which number an update was committed under, and how far backups reach.

Laws of the file: numbers only go up, one for each update, in the transaction that stores it; a backup vouches for what
its copy of the database holds and for nothing that was committed while it was made. Before the first backup nothing is
promised, and devices are told nothing. Source: docs/protocol.md, clause 10.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.schema import meta

_NUMBER = (
    sa.update(meta)
    .values(update_number=meta.c.update_number + 1)
    .returning(meta.c.update_number, meta.c.durable_number)
)
_LOAD = sa.select(meta.c.update_number, meta.c.durable_number)


@dataclass(frozen=True, slots=True)
class Promise:
    """What a receipt says of an update: its number, and the newest that is in a backup. Both 0 before the first."""

    row: int = 0
    durable: int = 0


def number_update(connection: Connection) -> Promise:
    """Takes the next number, for an update that is stored in this transaction."""
    return _promise(*connection.execute(_NUMBER).one())


def newest_promise(connection: Connection) -> Promise:
    """For an update that was stored before: not later than any that was."""
    return _promise(*connection.execute(_LOAD).one())


def newest_number(connection: Connection) -> int:
    """Of the update that was stored last."""
    return int(connection.execute(sa.select(meta.c.update_number)).scalar_one())


def note_backup(connection: Connection, number: int) -> None:
    """From now on a backup holds every update up to this number."""
    newer = sa.update(meta).where(meta.c.durable_number < number)
    connection.execute(newer.values(durable_number=number))


def _promise(number: int, durable: int) -> Promise:
    return Promise(number, durable) if durable else Promise()
