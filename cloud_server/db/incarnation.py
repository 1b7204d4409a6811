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
    releases,
    rounds,
    runs,
    updates,
)

_RELEASES = 1_000_000
# By this step devices tell a restored cloud from one that only starts again (docs/protocol.md, clause 9.5).
_FENCES = 1 << 20
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
    # Rounds under way end by themselves at once: their devices were told other orders by the lost life.
    connection.execute(sa.update(rounds).where(rounds.c.state.in_(_OPEN_ROUNDS)).values(deadline=now))
    connection.execute(sa.update(orders).where(orders.c.deadline > now).values(deadline=now))
    return found


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
