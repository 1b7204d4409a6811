"""Runs, rounds, orders, updates, heads and strategy state in SQL: what a run must remember through any crash.

Laws of the file: each function is one statement of fact within a transaction that the caller owns, so that
what belongs together commits together; no policy (which state follows which is the round machine's).
Digests and ids are bytes outside of this file and lower-case hex text in the tables. Source:
docs/architecture.md (The aggregator).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from cloud_server.db.schema import checkpoints, orders, rounds, runs, strategy_state, updates, windows
from wire.replay import Window

_SIGN = 1 << 63
# Rounds that failed have no metrics; more of them than this between two others say nothing about now.
_LOOK_BACK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One training campaign. `seed` (0 … 2**63 − 1) is secret: cohorts, order ids and noise come from it."""

    run: str
    graphs_sha256: bytes
    seed: int
    config: Mapping[str, Any] = field(default_factory=dict)
    status: str = "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One round. `head_sha256` is empty until the head moved."""

    number: int
    state: str
    base_sha256: bytes
    deadline: float
    config: Mapping[str, Any]
    seed: int
    node_ids: Sequence[int]
    started: float
    head_sha256: bytes = b""
    ended: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRow:
    """One head of a run.

    Attributes:
        round_number: that it came out of; 0: the run began with it.
        base_sha256, patch_key: the head that its patch is made on, and the patch's blob; empty without one.
        residual_key: the blob of what the patch left out, which the next one owes.
    """

    round_number: int
    sha256: bytes
    base_sha256: bytes = b""
    patch_key: str = ""
    residual_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderRow:
    """One order to one device."""

    order_id: bytes
    round_number: int
    device: str
    node_id: int
    kind: str
    head_sha256: bytes
    deadline: float
    state: str = "committed"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRow:
    """One reply. `body` is empty once its round committed, and while the bytes lie in the blob
    `artefact_key`."""

    update_id: bytes
    order_id: bytes
    round_number: int
    device: str
    kind: str
    state: str
    num_examples: int = 0
    codec: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    body: bytes = b""
    artefact_key: str = ""
    body_sha256: bytes = b""
    transfer_sha256: bytes = b""
    size_bytes: int = 0
    reason: str = ""
    received_at: float = 0.0
    norm: float = 0.0


# ---- statements that every reply needs ---------------------------------------------------------------------
# Made once: composing one with SQLAlchemy takes longer than SQLite takes to execute it.

_SOUND = ("stored", "folded", "discarded")
_UPDATE_COLUMNS = [column for column in updates.c if column.name != "body"]
_INSERT_UPDATE = sa.insert(updates)
_LOAD_UPDATE = sa.select(*_UPDATE_COLUMNS).where(updates.c.update_id == sa.bindparam("of_update"))
_SET_ORDER_STATE = sa.update(orders).where(orders.c.order_id == sa.bindparam("of_order"))
_WINDOW = (windows.c.device == sa.bindparam("of_device")) & (windows.c.type == sa.bindparam("of_type"))
_LOAD_WINDOW = sa.select(windows).where(_WINDOW)
_MOVE_WINDOW = sa.update(windows).where(_WINDOW)
_INSERT_WINDOW = sa.insert(windows)


# ---- runs --------------------------------------------------------------------------------------------------


def insert_run(connection: Connection, row: RunRow, now: float) -> None:
    """Begins a run; the model of `graphs_sha256` must be registered."""
    values = {"run": row.run, "created": now, "graphs_sha256": row.graphs_sha256.hex(), "seed": row.seed}
    connection.execute(sa.insert(runs).values(**values, config=dict(row.config), status=row.status))


def load_run(connection: Connection, run: str) -> RunRow | None:
    found = connection.execute(sa.select(runs).where(runs.c.run == run)).one_or_none()
    if found is None:
        return None
    graphs = bytes.fromhex(found.graphs_sha256)
    return RunRow(run=run, graphs_sha256=graphs, seed=found.seed, config=found.config, status=found.status)


def set_run_status(connection: Connection, run: str, status: str) -> None:
    """`active`, `paused` or `finished`."""
    connection.execute(sa.update(runs).where(runs.c.run == run).values(status=status))


# ---- heads and strategy state ------------------------------------------------------------------------------


def insert_head(connection: Connection, run: str, row: HeadRow, now: float) -> None:
    """The checkpoint that came out of a round. Its bytes, its patch and its residual are blobs."""
    values = {
        "run": run,
        "round": row.round_number,
        "sha256": row.sha256.hex(),
        "artefact_key": row.sha256.hex(),
        "base_sha256": row.base_sha256.hex() or None,
        "patch_key": row.patch_key or None,
        "residual_key": row.residual_key or None,
    }
    connection.execute(sa.insert(checkpoints).values(**values, created=now))


def load_head_row(connection: Connection, run: str) -> HeadRow | None:
    """The newest head of a run."""
    newest = sa.select(checkpoints).where(checkpoints.c.run == run).order_by(checkpoints.c.round.desc())
    found = connection.execute(newest.limit(1)).one_or_none()
    if found is None:
        return None
    return HeadRow(
        round_number=found.round,
        sha256=bytes.fromhex(found.sha256),
        base_sha256=bytes.fromhex(found.base_sha256 or ""),
        patch_key=found.patch_key or "",
        residual_key=found.residual_key or "",
    )


def load_head(connection: Connection, run: str) -> bytes | None:
    """SHA-256 of the newest head of a run."""
    found = load_head_row(connection, run)
    return None if found is None else found.sha256


def load_first_head(connection: Connection, run: str) -> bytes | None:
    """SHA-256 of the head that a run began with; None without such a run."""
    first = sa.select(checkpoints.c.sha256).where(checkpoints.c.run == run).order_by(checkpoints.c.round)
    found = connection.execute(first.limit(1)).scalar_one_or_none()
    return None if found is None else bytes.fromhex(found)


def forget_patches(connection: Connection, run: str, round_number: int) -> list[str]:
    """Drops patches and residuals of heads before a round's; returns the blobs that no row names any more."""
    table = checkpoints
    is_old = (table.c.run == run) & (table.c.round < round_number) & table.c.patch_key.is_not(None)
    query = sa.select(table.c.patch_key, table.c.residual_key).where(is_old)
    dropped = {key for row in connection.execute(query) for key in row if key}
    nothing = {"base_sha256": None, "patch_key": None, "residual_key": None}
    connection.execute(sa.update(table).where(is_old).values(**nothing))
    columns = (table.c.patch_key, table.c.residual_key)
    kept = {
        key
        for column in columns
        for key in connection.execute(sa.select(column).where(column.in_(dropped))).scalars()
    }
    return sorted(dropped - kept)


def insert_strategy_state(
    connection: Connection, run: str, round_number: int, state: Mapping[str, bytes]
) -> None:
    """What the strategy carries on after a round; older states are forgotten."""
    is_old = (strategy_state.c.run == run) & (strategy_state.c.round < round_number)
    connection.execute(sa.delete(strategy_state).where(is_old))
    rows = [{"run": run, "round": round_number, "name": name, "blob": blob} for name, blob in state.items()]
    if rows:
        connection.execute(sa.insert(strategy_state), rows)


def load_strategy_state(connection: Connection, run: str) -> dict[str, bytes]:
    table = strategy_state
    found = connection.execute(sa.select(table.c.name, table.c.blob).where(table.c.run == run))
    return {row.name: bytes(row.blob) for row in found}


# ---- rounds ------------------------------------------------------------------------------------------------


def insert_round(connection: Connection, run: str, row: RoundRow) -> None:
    connection.execute(
        sa.insert(rounds).values(
            run=run,
            number=row.number,
            state=row.state,
            base_sha256=row.base_sha256.hex(),
            head_sha256=row.head_sha256.hex() or None,
            deadline=row.deadline,
            config=dict(row.config),
            seed=row.seed,
            node_ids=list(row.node_ids),
            started=row.started,
            metrics=dict(row.metrics),
            reason=row.reason,
        )
    )


def update_round(connection: Connection, run: str, number: int, **values: Any) -> None:
    """Changes columns of one round; a digest may be given as bytes."""
    plain = {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}
    connection.execute(
        sa.update(rounds).where((rounds.c.run == run) & (rounds.c.number == number)).values(**plain)
    )


def load_rounds(connection: Connection, run: str, *, last: int = 0) -> list[RoundRow]:
    """The rounds of a run, oldest first; only the `last` so many if given."""
    query = sa.select(rounds).where(rounds.c.run == run).order_by(rounds.c.number.desc())
    found = connection.execute(query.limit(last) if last else query)
    return [_round(row) for row in found][::-1]


def load_metric(connection: Connection, run: str, name: str, *, last: int) -> list[float]:
    """A metric of the newest rounds of a run that have it, newest first."""
    query = sa.select(rounds.c.metrics).where(rounds.c.run == run).order_by(rounds.c.number.desc())
    found: list[float] = []
    for metrics in connection.execute(query.limit(_LOOK_BACK * last)).scalars():
        if name in metrics and len(found) < last:
            found.append(float(metrics[name]))
    return found


def count_moved(connection: Connection, run: str) -> int:
    """How many rounds of a run moved its head."""
    query = sa.select(sa.func.count()).where((rounds.c.run == run) & rounds.c.head_sha256.is_not(None))
    return int(connection.execute(query).scalar_one())


def _round(row: Any) -> RoundRow:
    return RoundRow(
        number=row.number,
        state=row.state,
        base_sha256=bytes.fromhex(row.base_sha256),
        head_sha256=bytes.fromhex(row.head_sha256 or ""),
        deadline=row.deadline,
        config=row.config,
        seed=row.seed,
        node_ids=tuple(row.node_ids),
        started=row.started,
        ended=row.ended or 0.0,
        metrics=row.metrics,
        reason=row.reason,
    )


# ---- orders ------------------------------------------------------------------------------------------------


def insert_orders(connection: Connection, run: str, rows: Iterable[OrderRow], now: float) -> None:
    values = [
        {
            "order_id": row.order_id.hex(),
            "run": run,
            "round": row.round_number,
            "device": row.device,
            "kind": row.kind,
            "state": row.state,
            "head_sha256": row.head_sha256.hex(),
            "overrides": {},
            "deadline": row.deadline,
            "created": now,
        }
        for row in rows
    ]
    if values:
        connection.execute(sa.insert(orders), values)


def load_orders(connection: Connection, run: str, round_number: int, kind: str) -> list[OrderRow]:
    """The orders of one collection, by device. Orders hold no node id: it is the registry's."""
    where = (orders.c.run == run) & (orders.c.round == round_number) & (orders.c.kind == kind)
    return [
        OrderRow(
            order_id=bytes.fromhex(row.order_id),
            round_number=row.round,
            device=row.device,
            node_id=0,
            kind=row.kind,
            head_sha256=bytes.fromhex(row.head_sha256),
            deadline=row.deadline,
            state=row.state,
        )
        for row in connection.execute(sa.select(orders).where(where).order_by(orders.c.device))
    ]


def set_order_state(
    connection: Connection, order_id: bytes, state: str, now: float, reason: str = ""
) -> None:
    """`accepted`, `declined` or `answered`."""
    values = {"state": state, "reason": reason, "ended": now, "of_order": order_id.hex()}
    connection.execute(_SET_ORDER_STATE, values)


def expire_orders(connection: Connection, run: str, round_number: int, kind: str, now: float) -> None:
    """Ends what is still open of a collection."""
    where = (orders.c.run == run) & (orders.c.round == round_number) & (orders.c.kind == kind)
    is_open = orders.c.state.in_(("committed", "sent", "accepted"))
    connection.execute(sa.update(orders).where(where & is_open).values(state="expired", ended=now))


# ---- updates -----------------------------------------------------------------------------------------------


def insert_update(connection: Connection, run: str, row: UpdateRow) -> None:
    values = {
        "update_id": row.update_id.hex(),
        "order_id": row.order_id.hex(),
        "run": run,
        "round": row.round_number,
        "device": row.device,
        "kind": row.kind,
        "num_examples": row.num_examples,
        "codec": row.codec,
        "metrics": dict(row.metrics),
        "body": row.body or None,
        "artefact_key": row.artefact_key or None,
        "body_sha256": row.body_sha256.hex(),
        "transfer_sha256": row.transfer_sha256.hex(),
        "size_bytes": row.size_bytes,
        "state": row.state,
        "reason": row.reason,
        "received_at": row.received_at,
        "norm": row.norm,
    }
    connection.execute(_INSERT_UPDATE, values)


def load_update(connection: Connection, update_id: bytes) -> UpdateRow | None:
    """One reply by its id, without its bytes."""
    row = connection.execute(_LOAD_UPDATE, {"of_update": update_id.hex()}).one_or_none()
    return None if row is None else _update(row, b"")


def load_updates(
    connection: Connection, run: str, round_number: int, kind: str, state: str = "stored"
) -> list[UpdateRow]:
    """Replies of one collection in the canonical order of their ids, without their bytes."""
    where = (updates.c.run == run) & (updates.c.round == round_number) & (updates.c.kind == kind)
    query = (
        sa.select(*_UPDATE_COLUMNS).where(where & (updates.c.state == state)).order_by(updates.c.update_id)
    )
    return [_update(row, b"") for row in connection.execute(query)]


def has_reply(connection: Connection, order_id: bytes, device: str) -> bool:
    """Whether a device's answer to an order is in the books, whatever became of it."""
    where = (updates.c.order_id == order_id.hex()) & (updates.c.device == device)
    return connection.execute(sa.select(updates.c.update_id).where(where).limit(1)).first() is not None


def load_norms(connection: Connection, run: str, round_number: int) -> list[float]:
    """How long the sound updates of a round were as they came, those that moved something at all."""
    where = (updates.c.run == run) & (updates.c.round == round_number) & (updates.c.kind == "train")
    query = sa.select(updates.c.norm).where(where & updates.c.state.in_(_SOUND) & (updates.c.norm > 0.0))
    return [float(norm) for norm in connection.execute(query).scalars()]


def count_sound(connection: Connection, device: str, since: float) -> int:
    """How many updates of a device were taken after a time (unix seconds), of whatever run."""
    where = (updates.c.device == device) & (updates.c.received_at > since) & (updates.c.kind == "train")
    query = sa.select(sa.func.count()).where(where & updates.c.state.in_(_SOUND))
    return int(connection.execute(query).scalar_one())


def load_body(connection: Connection, update_id: bytes) -> bytes:
    """The opened body of a stored reply, empty where it is kept as a blob or was dropped."""
    query = sa.select(updates.c.body).where(updates.c.update_id == update_id.hex())
    return bytes(connection.execute(query).scalar_one_or_none() or b"")


def end_updates(
    connection: Connection, run: str, round_number: int, kind: str, state: str, reason: str = ""
) -> None:
    """Moves every stored reply of a collection to its terminal state and drops its bytes."""
    where = (updates.c.run == run) & (updates.c.round == round_number) & (updates.c.kind == kind)
    values = {"state": state, "reason": reason, "body": None, "artefact_key": None}
    connection.execute(sa.update(updates).where(where & (updates.c.state == "stored")).values(**values))


def discard_updates(connection: Connection, update_ids: Iterable[bytes], reason: str) -> None:
    """Ends stored replies that cannot be folded, and drops their bytes."""
    where = updates.c.update_id.in_([update_id.hex() for update_id in update_ids])
    values = {"state": "discarded", "reason": reason, "body": None, "artefact_key": None}
    connection.execute(sa.update(updates).where(where & (updates.c.state == "stored")).values(**values))


def end_run_updates(connection: Connection, run: str, state: str) -> None:
    """Moves every stored reply of a run to its terminal state and drops its bytes."""
    values = {"state": state, "body": None, "artefact_key": None}
    where = (updates.c.run == run) & (updates.c.state == "stored")
    connection.execute(sa.update(updates).where(where).values(**values))


def load_artefact_keys(connection: Connection, run: str) -> list[str]:
    """The blobs that hold bodies of a run's stored replies."""
    where = (updates.c.run == run) & updates.c.artefact_key.is_not(None)
    return list(connection.execute(sa.select(updates.c.artefact_key).where(where)).scalars())


def _update(row: Any, body: bytes) -> UpdateRow:
    return UpdateRow(
        update_id=bytes.fromhex(row.update_id),
        order_id=bytes.fromhex(row.order_id),
        round_number=row.round,
        device=row.device,
        kind=row.kind,
        state=row.state,
        num_examples=row.num_examples,
        codec=row.codec,
        metrics=row.metrics,
        body=body,
        artefact_key=row.artefact_key or "",
        body_sha256=bytes.fromhex(row.body_sha256),
        transfer_sha256=bytes.fromhex(row.transfer_sha256),
        size_bytes=row.size_bytes,
        reason=row.reason,
        received_at=row.received_at,
        norm=row.norm,
    )


# ---- replay windows ----------------------------------------------------------------------------------------


def load_window(connection: Connection, device: str, kind: str) -> Window:
    """What was seen from a device of one message type; an empty window for the first message."""
    row = connection.execute(_LOAD_WINDOW, {"of_device": device, "of_type": kind}).one_or_none()
    if row is None:
        return Window()
    signed = row.bitmap - 2 * _SIGN if row.bitmap >= _SIGN else row.bitmap
    return Window.from_row(row.epoch, row.highest, signed)


def save_window(connection: Connection, device: str, kind: str, window: Window) -> None:
    """Moves the window, in the transaction that stores the message it let in."""
    values = {"epoch": window.epoch, "highest": window.highest, "bitmap": window.bitmap}
    if not connection.execute(_MOVE_WINDOW, {**values, "of_device": device, "of_type": kind}).rowcount:
        connection.execute(_INSERT_WINDOW, {**values, "device": device, "type": kind})
