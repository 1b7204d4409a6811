"""A database that comes from a backup: what must not be the same as in the life that went on after it.

Laws of the file: numbers only ever go up, and above anything that the lost life can have used, whatever backup was
restored how often: the fence (which is the epoch of every message downward) goes on from the clock's seconds, since
nothing starts once a second for years; releases are counted from far above. Runs get a new seed, so that no order
has an id that was given before: a recorded answer to a lost order is an answer to none.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.schema import (
    checkpoints,
    fencing,
    meta,
    orders,
    presence,
    privacy_ledger,
    releases,
    rounds,
    runs,
    updates,
)

_RELEASES = 1_000_000
# By this step devices tell a restored cloud from one that only starts again (docs/protocol.md, clause 9.5).
_FENCES = 1 << 20
# What only a masked round has in its configuration (`secure/desk.py`, `secure/helped.py`).
_MASKED = {"mask_groups", "book", "helped"}
_OPEN_ROUNDS = ("training", "evaluating")


@dataclass(frozen=True, slots=True)
class Incarnation:
    """What a restored database says of itself. `release_floor`: releases are numbered above it."""

    number: int
    fence: int
    release_floor: int


def reincarnate(connection: Connection, now: float) -> Incarnation:
    """Begins another life, in the transaction that says so in the books."""
    row = connection.execute(sa.select(meta).with_for_update()).one()
    highest = max(
        int(row.release_floor),
        _highest(connection, releases.c.version),
        _highest(connection, presence.c.release_version),
    )
    token = int(connection.execute(sa.select(fencing.c.token)).scalar_one())
    found = Incarnation(row.incarnation + 1, max(token + _FENCES, int(now)), highest + _RELEASES)
    connection.execute(
        sa.update(meta).values(
            incarnation=found.number,
            release_floor=found.release_floor,
            devices_version=meta.c.devices_version + 1,
            # What is here came out of a backup.
            durable_number=meta.c.update_number,
        )
    )
    connection.execute(sa.update(fencing).values(token=found.fence))
    for name in connection.execute(sa.select(runs.c.run)).scalars().all():
        seed = secrets.randbelow(2**63 - 1) + 1
        connection.execute(sa.update(runs).where(runs.c.run == name).values(seed=seed))
    _end_rounds(connection, now)
    return found


def _end_rounds(connection: Connection, now: float) -> None:
    """Ends at once the rounds under way that cannot go on in another life: the lost one may have shown the noise of a
    private round, and the sum of a masked one.

    A plain one goes on to its own deadline: its orders are in the backup, with the ids that devices know, so what
    they still hold for it (docs/protocol.md, 10.5) is taken, and counts once in the head of this life.
    """
    going = connection.execute(
        sa.select(rounds.c.run, rounds.c.number, rounds.c.config).where(rounds.c.state.in_(_OPEN_ROUNDS))
    ).all()
    for run, number, config in going:
        charged = (privacy_ledger.c.run == run) & (privacy_ledger.c.round == number)
        is_private = connection.execute(sa.select(privacy_ledger.c.seq).where(charged)).first() is not None
        if not is_private and not _MASKED & config.keys():
            continue
        here = (rounds.c.run == run) & (rounds.c.number == number)
        connection.execute(sa.update(rounds).where(here).values(deadline=now))
        asked = (orders.c.run == run) & (orders.c.round == number) & (orders.c.deadline > now)
        connection.execute(sa.update(orders).where(asked).values(deadline=now))


def load_incarnation(connection: Connection) -> int:
    """Which life of the cloud this is."""
    return int(connection.execute(sa.select(meta.c.incarnation)).scalar_one())


def _highest(connection: Connection, column: sa.Column[int]) -> int:
    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.max(column), 0))).scalar_one())


def load_blob_keys(connection: Connection) -> set[str]:
    """The blobs that the database cannot go on without: newest heads, their patches, replies that wait to be folded."""
    newest = (
        sa.select(checkpoints.c.run, sa.func.max(checkpoints.c.round).label("round"))
        .group_by(checkpoints.c.run)
        .subquery()
    )
    heads = sa.select(checkpoints.c.artefact_key, checkpoints.c.patch_key, checkpoints.c.residual_key).join(
        newest, (checkpoints.c.run == newest.c.run) & (checkpoints.c.round == newest.c.round)
    )
    found = {key for row in connection.execute(heads) for key in row if key}
    waiting = sa.select(updates.c.artefact_key).where(updates.c.artefact_key.is_not(None))
    return found | set(connection.execute(waiting).scalars())
