"""The orders that this device has accepted, and what became of them; and the replay windows of the cloud's
messages.

Laws of the file: an order that comes again is answered again, never trained twice; a message is marked as
seen in the same transaction that stores its effect. Source: docs/protocol.md (orders, replay).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edge_agent.store.storage import Database
from wire.errors import StorageError
from wire.replay import Window

DEFAULT_MAX_ORDERS: Final = 1024


@dataclass(frozen=True, slots=True)
class SeenOrder:
    """An order that was accepted. `update_id` is None while its job has not put an update into the outbox."""

    order_id: bytes
    kind: str
    run: str
    round_number: int
    update_id: bytes | None
    seen_at: float


class Orders:
    """The order book of one device; the newest `max_orders` are remembered."""

    def __init__(self, database: Database, *, max_orders: int = DEFAULT_MAX_ORDERS) -> None:
        self._database = database
        self._max_orders = max_orders

    def accept(self, order_id: bytes, kind: str, run: str, round_number: int, now: float) -> bool:
        """Remembers an order; False when it was accepted before (nothing changes then)."""
        with self._database.transaction() as connection:
            added = connection.execute(
                "INSERT OR IGNORE INTO orders VALUES (?, ?, ?, ?, NULL, ?)",
                (order_id, kind, run, round_number, now),
            ).rowcount
            connection.execute(
                "DELETE FROM orders WHERE rowid <= (SELECT max(rowid) FROM orders) - ?", (self._max_orders,)
            )
        return added > 0

    def find(self, order_id: bytes) -> SeenOrder | None:
        """What is known of an order, or None."""
        rows = self._database.read(
            "SELECT order_id, kind, run, round_number, update_id, seen_at FROM orders WHERE order_id = ?",
            (order_id,),
        )
        return SeenOrder(*rows[0]) if rows else None

    def unanswered(self) -> list[SeenOrder]:
        """Accepted orders without an update, oldest first: what a crash or a restart interrupted."""
        rows = self._database.read(
            "SELECT order_id, kind, run, round_number, update_id, seen_at FROM orders"
            " WHERE update_id IS NULL ORDER BY rowid"
        )
        return [SeenOrder(*row) for row in rows]

    def forget(self, order_id: bytes) -> None:
        """Drops an order whose job failed, so that a repetition is tried again."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM orders WHERE order_id = ?", (order_id,))


class ReplayWindows:
    """One window per type of downward message; the cloud is the only sender."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def accept(self, kind: str, epoch: int, seq: int) -> None:
        """Lets a message in once. Call it inside the transaction that stores the message's effect, if there
        is one.

        Raises:
            ReplayError: (peer) seen before, or too old to tell.
        """
        with self._database.transaction(durable=False) as connection:
            row = connection.execute(
                "SELECT epoch, highest, bitmap FROM windows WHERE kind = ?", (kind,)
            ).fetchone()
            moved = _window(row).accept(epoch, seq)
            connection.execute("INSERT OR REPLACE INTO windows VALUES (?, ?, ?, ?)", (kind, *moved.to_row()))


def _window(row: tuple[int, int, int] | None) -> Window:
    """A damaged window starts anew: what it then lets in twice, the order book and the outbox recognize."""
    if row is None:
        return Window()
    try:
        return Window.from_row(*row)
    except (StorageError, TypeError):
        return Window()
