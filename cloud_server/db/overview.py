"""Questions of a person about runs and rounds, for commands, pages and metrics. Reads only.

Laws of the file: no secret leaves it (a run's seed draws cohorts and noise); each function answers within the
caller's transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.carried import load_moved, staleness
from cloud_server.db.releases import HELD, RELEASED, ROLLED_BACK
from cloud_server.db.schema import meta, orders, presence, releases, rollouts, rounds, runs, updates


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
    """One round with what became of each order and update; None where there is none.

    Of each update it says on which base it was trained, in answer to which round, and how many heads came in between.
    """
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
        orders.c.round.label("asked_in"),
        orders.c.head_sha256.label("base_sha256"),
    ).join_from(updates, orders, updates.c.order_id == orders.c.order_id)
    update = update.where((updates.c.run == run) & (updates.c.round == number))
    facts["orders"] = [dict(one._mapping) for one in connection.execute(mine)]
    moved = load_moved(connection, run)
    facts["updates"] = [
        {**one._mapping, "staleness": staleness(moved, one.asked_in, number)}
        for one in connection.execute(update.order_by(updates.c.received_at))
    ]
    return facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What happened since the database was made, of all runs.

    Attributes:
        rounds: ended rounds by state.
        round_buckets: rounds that were done by duration, one count for each bound and one above them.
        round_seconds: the sum of those durations.
        updates: replies by kind, state and reason.
        held, released: the gate's decisions; holds by reason.
        release_version: that the ring runs; 0 for none.
    """

    rounds: Mapping[str, float]
    round_buckets: Sequence[int]
    round_seconds: float
    updates: Mapping[tuple[str, str, str], int]
    held: Mapping[str, float]
    released: int
    release_version: int


def load_totals(connection: Connection, *, ring: str, bounds: Sequence[float]) -> Totals:
    """Counts everything; a pass over the updates.

    Args:
        bounds: of the buckets of round durations, in seconds, rising.
    """
    count = sa.func.count()
    ended = sa.select(rounds.c.state, count).where(rounds.c.state.in_(("done", "failed")))
    replies = sa.select(updates.c.kind, updates.c.state, updates.c.reason, count)
    decided = sa.select(releases.c.state, releases.c.reason, count).where(releases.c.run != "")
    gate = connection.execute(decided.group_by(releases.c.state, releases.c.reason)).all()
    current = sa.select(rollouts.c.release_version).where(rollouts.c.ring == ring)
    buckets, seconds = _durations(connection, bounds)
    return Totals(
        rounds={state: float(number) for state, number in connection.execute(ended.group_by(rounds.c.state))},
        round_buckets=buckets,
        round_seconds=seconds,
        updates={
            (kind, state, reason): number
            for kind, state, reason, number in connection.execute(
                replies.group_by(updates.c.kind, updates.c.state, updates.c.reason)
            )
        },
        held={reason: float(number) for state, reason, number in gate if state == HELD},
        released=sum(number for state, _, number in gate if state in (RELEASED, ROLLED_BACK)),
        release_version=connection.execute(
            current.order_by(rollouts.c.serial.desc()).limit(1)
        ).scalar_one_or_none()
        or 0,
    )


def _durations(connection: Connection, bounds: Sequence[float]) -> tuple[list[int], float]:
    """How long rounds took, counted by the database."""
    seconds = rounds.c.ended - rounds.c.started
    bucket = sa.case(*((seconds <= bound, index) for index, bound in enumerate(bounds)), else_=len(bounds))
    query = sa.select(bucket.label("bucket"), sa.func.count(), sa.func.sum(seconds))
    found = connection.execute(query.where(rounds.c.state == "done").group_by("bucket")).all()
    counts = [0] * (len(bounds) + 1)
    for index, number, _ in found:
        counts[index] = number
    return counts, float(sum(total for _, _, total in found))


def count_stored(connection: Connection) -> int:
    """Replies that wait to be folded."""
    query = sa.select(sa.func.count()).select_from(updates).where(updates.c.state == "stored")
    return int(connection.execute(query).scalar_one())


def count_present(connection: Connection, *, version: int | None = None) -> int:
    """Devices that are online or, where a release is named, that said last that they run it."""
    query = sa.select(sa.func.count()).select_from(presence)
    is_meant = presence.c.status == "online" if version is None else presence.c.release_version == version
    return int(connection.execute(query.where(is_meant)).scalar_one())


def count_received(connection: Connection, run: str) -> tuple[int, float]:
    """Replies of a run in the books, whatever became of them, and when the last one came (unix seconds, or 0)."""
    query = sa.select(sa.func.count(), sa.func.max(updates.c.received_at)).where(updates.c.run == run)
    number, last = connection.execute(query).one()
    return int(number), float(last or 0.0)


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
