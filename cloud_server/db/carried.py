"""Orders that outlive their round, in a buffered run: whose they are, and how many heads have come since.

Laws of the file: reads, and the end of what is too old; each function answers within the caller's transaction. Of a
buffered run an update's row names the round that it counts in, and its order the round that it was asked in: its
staleness is the number of heads between the two, so that no number is written twice.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any, Final

import sqlalchemy as sa

from cloud_server.db.engine import Connection
from cloud_server.db.rounds import OrderRow
from cloud_server.db.schema import checkpoints, orders, updates

ACCEPTED: Final = "accepted"
TOO_STALE: Final = "too_stale"
"""Why an order ended whose update would count no more."""


def load_carried(connection: Connection, run: str, before: int) -> list[OrderRow]:
    """Training orders of rounds before one which their devices accepted and have not answered, by device."""
    replied = sa.exists().where(
        (updates.c.order_id == orders.c.order_id) & (updates.c.device == orders.c.device)
    )
    where = (orders.c.run == run) & (orders.c.kind == "train") & (orders.c.round < before)
    query = sa.select(orders).where(where & (orders.c.state == ACCEPTED) & ~replied)
    return [_order(row) for row in connection.execute(query.order_by(orders.c.device, orders.c.round))]


def load_orders_of_stored(connection: Connection, run: str, round_number: int) -> dict[bytes, OrderRow]:
    """The orders of the updates that are stored for a round, by order id, whatever round they were given in."""
    stored = (updates.c.run == run) & (updates.c.round == round_number) & (updates.c.kind == "train")
    asked = sa.select(updates.c.order_id).where(stored & (updates.c.state == "stored"))
    found = connection.execute(sa.select(orders).where(orders.c.order_id.in_(asked)))
    return {row.order_id: row for row in map(_order, found)}


def load_moved(connection: Connection, run: str) -> list[int]:
    """The rounds of a run that moved its head, rising."""
    query = sa.select(checkpoints.c.round).where((checkpoints.c.run == run) & (checkpoints.c.round > 0))
    return sorted(set(connection.execute(query).scalars()))


def staleness(moved: Sequence[int], asked_in: int, counts_in: int) -> int:
    """How many heads came after the base of a round's orders, before a later round collects.

    Args:
        moved: from `load_moved`.
    """
    return max(0, bisect_left(moved, counts_in) - bisect_left(moved, asked_in))


def load_past_order(connection: Connection, order_id: bytes) -> tuple[str, str] | None:
    """Whose an order is, of whatever round, and why it ended."""
    query = sa.select(orders.c.device, orders.c.reason).where(orders.c.order_id == order_id.hex())
    row = connection.execute(query).one_or_none()
    return None if row is None else (row.device, row.reason)


def note_accepted(connection: Connection, order_id: bytes) -> None:
    """A device said that it is at work on an order."""
    where = (orders.c.order_id == order_id.hex()) & orders.c.state.in_(("committed", "sent"))
    connection.execute(sa.update(orders).where(where).values(state=ACCEPTED))


def expire_silent(connection: Connection, run: str, round_number: int, now: float) -> None:
    """Ends the training orders of a round that no device has accepted."""
    where = (orders.c.run == run) & (orders.c.round == round_number) & (orders.c.kind == "train")
    is_silent = orders.c.state.in_(("committed", "sent"))
    connection.execute(sa.update(orders).where(where & is_silent).values(state="expired", ended=now))


def expire_each(connection: Connection, order_ids: Iterable[bytes], now: float, reason: str) -> None:
    """Ends orders; a late update is refused for the same reason."""
    values = {"state": "expired", "ended": now, "reason": reason}
    for order_id in order_ids:
        connection.execute(sa.update(orders).where(orders.c.order_id == order_id.hex()).values(**values))


def expire_run(connection: Connection, run: str, now: float) -> None:
    """Ends every order of a run that is still open."""
    is_open = orders.c.state.in_(("committed", "sent", ACCEPTED))
    values = {"state": "expired", "ended": now}
    connection.execute(sa.update(orders).where((orders.c.run == run) & is_open).values(**values))


def move_buffer(connection: Connection, run: str, round_number: int) -> None:
    """What is stored for a round that nothing was folded in counts in the next one."""
    where = (updates.c.run == run) & (updates.c.round == round_number) & (updates.c.kind == "train")
    moved = sa.update(updates).where(where & (updates.c.state == "stored"))
    connection.execute(moved.values(round=round_number + 1))


def _order(row: Any) -> OrderRow:
    return OrderRow(
        order_id=bytes.fromhex(row.order_id),
        round_number=row.round,
        device=row.device,
        node_id=0,
        kind=row.kind,
        head_sha256=bytes.fromhex(row.head_sha256),
        deadline=row.deadline,
        state=row.state,
    )
