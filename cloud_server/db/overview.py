"""Questions of a person about runs and rounds, for commands and pages. Reads only.

Laws of the file: no secret leaves it (a run's seed draws cohorts and noise); each function is one query
within the caller's transaction.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.schema import meta, orders, rounds, runs, updates


def list_runs(connection: Connection) -> list[dict[str, Any]]:
    """Every run, oldest first."""
    columns = (runs.c.run, runs.c.status, runs.c.graphs_sha256, runs.c.created)
    return [dict(row._mapping) for row in connection.execute(sa.select(*columns).order_by(runs.c.created))]


def list_rounds(connection: Connection, run: str = "", *, last: int = 0) -> list[dict[str, Any]]:
    """Rounds, oldest first; of one run and only the `last` so many if given."""
    query = sa.select(rounds, runs.c.created.label("run_created")).join(runs, runs.c.run == rounds.c.run)
    query = query.where(rounds.c.run == run) if run else query
    newest = query.order_by(runs.c.created.desc(), rounds.c.number.desc())
    found = connection.execute(newest.limit(last) if last else newest).all()
    return [_round(row._mapping) for row in reversed(found)]


def show_round(connection: Connection, run: str, number: int) -> dict[str, Any] | None:
    """One round with what became of each order and update; None where there is none."""
    found = connection.execute(sa.select(rounds).where((rounds.c.run == run) & (rounds.c.number == number)))
    row = found.one_or_none()
    if row is None:
        return None
    facts = _round(row._mapping)
    order = sa.select(orders.c.device, orders.c.kind, orders.c.state, orders.c.reason)
    mine = order.where((orders.c.run == run) & (orders.c.round == number)).order_by(
        orders.c.kind, orders.c.device
    )
    update = sa.select(
        updates.c.device,
        updates.c.kind,
        updates.c.state,
        updates.c.reason,
        updates.c.num_examples,
        updates.c.size_bytes,
        updates.c.metrics,
        updates.c.received_at,
    ).where((updates.c.run == run) & (updates.c.round == number))
    facts["orders"] = [dict(one._mapping) for one in connection.execute(mine)]
    facts["updates"] = [
        dict(one._mapping) for one in connection.execute(update.order_by(updates.c.received_at))
    ]
    return facts


def load_incarnation(connection: Connection) -> int:
    """How often this cloud was restored from a backup, counted from 1."""
    return int(connection.execute(sa.select(meta.c.incarnation)).scalar_one())


def _round(row: Any) -> dict[str, Any]:
    ended = row["ended"]
    return {
        "run": row["run"],
        "round": row["number"],
        "state": row["state"],
        "reason": row["reason"],
        "cohort": len(row["node_ids"]),
        "base_sha256": row["base_sha256"],
        "head_sha256": row["head_sha256"],
        "metrics": row["metrics"],
        "started": row["started"],
        "ended": ended,
        "seconds": None if ended is None else ended - row["started"],
        "deadline": row["deadline"],
    }
