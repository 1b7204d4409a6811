"""The record of a stock ServerApp in SQL: what it asked of its grid and was told, step by step, while its run goes on.

Laws of the file: a step is in the books before the app knows its answer; steps of a run are dropped with the end of the
run, or when the operator begins the app anew; what an app before that got ends as `discarded`, never in a later head.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.rounds import load_artefact_keys
from cloud_server.db.schema import grid_steps, orders, rounds, updates

BEGIN = "begin"
"""The first step of every record: what the app draws from, and the exchange after which it counts."""
_BEGUN_ANEW = "the app was begun anew"
_ENDED_ROUNDS = ("done", "failed")
_OPEN_ORDERS = ("committed", "sent", "accepted")


@dataclass(frozen=True, slots=True, kw_only=True)
class GridStep:
    """One step of an app. `asked` and `answer` are plain JSON, whose meaning is the tape's."""

    position: int
    kind: str
    asked: Mapping[str, Any] = field(default_factory=dict)
    answer: Mapping[str, Any] = field(default_factory=dict)


def insert_step(connection: Connection, run: str, step: GridStep, now: float) -> None:
    values = {"asked": dict(step.asked), "answer": dict(step.answer), "at": now}
    row = {"run": run, "position": step.position, "kind": step.kind, **values}
    connection.execute(sa.insert(grid_steps).values(**row))


def load_steps(connection: Connection, run: str) -> list[GridStep]:
    """All of a run, in order."""
    query = sa.select(grid_steps).where(grid_steps.c.run == run).order_by(grid_steps.c.position)
    return [
        GridStep(position=row.position, kind=row.kind, asked=row.asked, answer=row.answer)
        for row in connection.execute(query)
    ]


def drop_steps(connection: Connection, run: str) -> None:
    connection.execute(sa.delete(grid_steps).where(grid_steps.c.run == run))


def begin_anew(connection: Connection, run: str, now: float) -> list[str]:
    """Forgets what the app of a run did so far: it begins again with the number after the newest exchange.

    The head stays, the app sends its own. Returns the blobs that nobody needs after the commit.
    """
    newest = sa.select(sa.func.coalesce(sa.func.max(rounds.c.number), 0)).where(rounds.c.run == run)
    after = int(connection.execute(newest).scalar_one())
    keys = load_artefact_keys(connection, run)
    dropped = {"state": "discarded", "reason": _BEGUN_ANEW, "body": None, "artefact_key": None}
    stored = (updates.c.run == run) & (updates.c.state == "stored")
    connection.execute(sa.update(updates).where(stored).values(**dropped))
    waiting = (orders.c.run == run) & orders.c.state.in_(_OPEN_ORDERS)
    connection.execute(sa.update(orders).where(waiting).values(state="expired", ended=now))
    going = (rounds.c.run == run) & rounds.c.state.not_in(_ENDED_ROUNDS)
    failed = {"state": "failed", "ended": now, "reason": _BEGUN_ANEW}
    connection.execute(sa.update(rounds).where(going).values(**failed))
    drop_steps(connection, run)
    answer = {"after": after, "seed": secrets.randbelow(2**63 - 1) + 1}
    insert_step(connection, run, GridStep(position=1, kind=BEGIN, answer=answer), now)
    return keys
