"""Models, releases and rollouts in SQL.

Laws of the file: each function is one statement of fact within a transaction that the caller owns; versions
count from 1 in a fleet and are never used twice. No policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.schema import checkpoints, meta, models, releases, rollouts

CANDIDATE, HELD, RELEASED, ROLLED_BACK = "candidate", "held", "released", "rolled_back"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """A model that was imported: its signed `manifest.json` and the parameters that came with it."""

    graphs_sha256: str
    name: str
    manifest: bytes
    checkpoint_sha256: str
    created: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRow:
    """One release. Digests are hex; `run` is empty and `round` 0 for the parameters of an imported bundle."""

    version: int
    graphs_sha256: str
    checkpoint_sha256: str
    int8_sha256: str
    float32_sha256: str
    run: str = ""
    round: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: str = CANDIDATE
    reason: str = ""
    created: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRow:
    """One signed statement about a ring. `previous_version` 0: the ring was empty."""

    ring: str
    serial: int
    release_version: int
    previous_version: int
    rollback: bool
    reason: str = ""
    created: float


def insert_model(connection: Connection, row: ModelRow) -> None:
    connection.execute(sa.insert(models).values(**{name: getattr(row, name) for name in row.__slots__}))


def load_models(connection: Connection) -> list[ModelRow]:
    """Every model, oldest first."""
    query = sa.select(models).order_by(models.c.created, models.c.graphs_sha256)
    return [ModelRow(**row._mapping) for row in connection.execute(query)]


def load_model(connection: Connection, graphs_sha256: str) -> ModelRow | None:
    query = sa.select(models).where(models.c.graphs_sha256 == graphs_sha256)
    row = connection.execute(query).one_or_none()
    return None if row is None else ModelRow(**row._mapping)


def delete_model(connection: Connection, graphs_sha256: str) -> bool:
    """Removes a model and those of its releases that no ring ever ran; False when there is none.

    Its newest version may be given anew: nothing of it was announced.
    """
    connection.execute(
        sa.delete(releases).where(
            (releases.c.graphs_sha256 == graphs_sha256) & (releases.c.state == CANDIDATE)
        )
    )
    return bool(connection.execute(sa.delete(models).where(models.c.graphs_sha256 == graphs_sha256)).rowcount)


def next_version(connection: Connection) -> int:
    """The version after the highest that was ever used, candidates included, and by a cloud before a restore."""
    highest = sa.select(sa.func.coalesce(sa.func.max(releases.c.version), 0))
    floor = connection.execute(sa.select(meta.c.release_floor)).scalar_one()
    return max(int(connection.execute(highest).scalar_one()), int(floor)) + 1


def insert_release(connection: Connection, row: ReleaseRow) -> None:
    values = {name: getattr(row, name) for name in row.__slots__} | {"metrics": dict(row.metrics)}
    connection.execute(sa.insert(releases).values(**values))


def update_release(connection: Connection, version: int, **values: Any) -> bool:
    """Changes columns of a release; False when there is no such version."""
    query = sa.update(releases).where(releases.c.version == version).values(**values)
    return bool(connection.execute(query).rowcount)


def load_release(connection: Connection, version: int) -> ReleaseRow | None:
    row = connection.execute(sa.select(releases).where(releases.c.version == version)).one_or_none()
    return None if row is None else ReleaseRow(**row._mapping)


def load_release_of(connection: Connection, run: str, round_number: int) -> ReleaseRow | None:
    """What became of a round's candidate, if the gate has looked at it: asked again after a restart."""
    query = sa.select(releases).where((releases.c.run == run) & (releases.c.round == round_number))
    row = connection.execute(query).one_or_none()
    return None if row is None else ReleaseRow(**row._mapping)


def load_releases(connection: Connection) -> list[ReleaseRow]:
    """Every release, held-back candidates included, oldest first."""
    return [
        ReleaseRow(**row._mapping)
        for row in connection.execute(sa.select(releases).order_by(releases.c.version))
    ]


def insert_rollout(connection: Connection, row: RolloutRow) -> None:
    connection.execute(sa.insert(rollouts).values(**{name: getattr(row, name) for name in row.__slots__}))


def load_rollouts(connection: Connection, ring: str = "") -> list[RolloutRow]:
    """Every statement, in order; of one ring if given."""
    query = sa.select(rollouts).order_by(rollouts.c.created, rollouts.c.ring, rollouts.c.serial)
    found = connection.execute(query.where(rollouts.c.ring == ring) if ring else query)
    return [RolloutRow(**row._mapping) for row in found]


def is_checkpoint(connection: Connection, sha256: str) -> bool:
    """Whether a blob is a run's head, which devices may fetch (raw updates in the same store are not)."""
    return (
        connection.execute(sa.select(checkpoints.c.run).where(checkpoints.c.sha256 == sha256)).first()
        is not None
    )
