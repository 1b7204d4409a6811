"""What the device owes the cloud: updates and evaluations, kept on disk until a receipt ends them.

Laws of the file: a row is on disk before its first chunk is sent; every `update_id` ends in exactly one terminal
state (`stored`, `refused`, `expired`, `evicted`, `destroyed`) and is counted there once; a receipt ends a row only
if it names the SHA-256 of the very bytes that were sent; every row carries a digest, because neither SQLite nor a
flash card notices a flipped bit; a body is sealed on the disk (`at_rest.py`). Source: docs/architecture.md (law 3),
docs/protocol.md (receipts).
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final, Literal

from edge_agent.store.sealed_rows import is_intact, place_of_update, row_digest, update_place
from edge_agent.store.storage import Database
from process.logs import get_logger
from wire.errors import StorageError

_log = get_logger("edge_agent.store.outbox")

Kind = Literal["up", "ev"]
EndState = Literal["stored", "refused", "expired", "evicted", "destroyed"]

END_STATES: Final[tuple[EndState, ...]] = ("stored", "refused", "expired", "evicted", "destroyed")
DEFAULT_MAX_BYTES: Final = 64 * 1024 * 1024
# Ended rows are kept without their bodies, so that a late receipt or a repeated order still finds its update.
ENDED_ROWS_KEPT: Final = 1024

_OPEN: Final = "open"
# Whatever is not a terminal state is open: a flipped bit in this column must not make a row invisible.
_IS_OPEN: Final = f"state NOT IN ({', '.join(repr(state) for state in END_STATES)})"
_IS_COPY: Final = "state = 'stored' AND cloud_row > 0"
# Ended rows have no body but for the copies that are kept until the cloud has a backup of them.
_KEPT_BYTES: Final = (
    "SELECT total(length(body) + coalesce(length(sealed), 0)) FROM outbox LEFT JOIN sealings USING (row)"
)
# When room is needed: evaluations before updates, the oldest first.
_FIRST_TO_GO: Final = f"SELECT row FROM outbox WHERE {_IS_OPEN} ORDER BY kind = 'up', row LIMIT 1"
_VERDICTS: Final[dict[str, EndState]] = {
    "stored": "stored",
    "duplicate": "stored",
    "refused": "refused",
    "expired": "expired",
}
_SELECT: Final = (
    "SELECT row, update_id, order_id, run, round_number, kind, created, deadline, at_rest_key_id, sha256, body,"
    f" sealed, transfer, kem_key_id FROM outbox LEFT JOIN sealings USING (row) WHERE {_IS_OPEN}"
)


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """One update or evaluation that the cloud has not receipted.

    Attributes:
        row: grows with every row of this database.
        body: the encoded message body, before sealing (it is sealed anew after a change of keys).
        sealed: the sealed message as it is sent, or None when it has to be sealed (again).
        transfer: SHA-256 of `sealed`; the receipt names it.
        kem_key_id: the cloud's key that `sealed` was sealed to; empty when that is not known.
    """

    row: int
    update_id: bytes
    order_id: bytes
    run: str
    round_number: int
    kind: Kind
    body: bytes
    sealed: bytes | None
    transfer: bytes | None
    created: float
    deadline: float
    kem_key_id: bytes = b""


@dataclass(frozen=True, slots=True)
class DestroyedUpdate:
    """An update that the disk destroyed, or whose key is lost, and the order that waits for it."""

    order_id: bytes
    run: str
    round_number: int
    reason: str


class Outbox:
    """The outbox of one device.

    Args:
        max_bytes: cap over bodies and sealed messages. To make room for a new row, first what is past its deadline
            goes (`expired`), then copies of what the cloud has acknowledged, then evaluations, then updates
            (`evicted`), the oldest first.
    """

    def __init__(self, database: Database, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._database = database
        self._max_bytes = max_bytes
        self._destroyed: list[DestroyedUpdate] = []

    def put(
        self,
        update_id: bytes,
        order_id: bytes,
        run: str,
        round_number: int,
        kind: Kind,
        body: bytes,
        now: float,
        deadline: float,
    ) -> bool:
        """Stores one row; on disk when it returns, together with the order's answer (`orders.py`).

        Returns:
            False when `update_id` is there already (open or ended): nothing is changed.

        Raises:
            StorageError: larger than the outbox, or the disk is full.
        """
        if len(body) > self._max_bytes:
            raise StorageError(
                "update is larger than the outbox", size_bytes=len(body), limit_bytes=self._max_bytes
            )
        columns = (update_id, order_id, run, round_number, kind, now, deadline)
        place = update_place(*columns)
        with self._database.transaction() as connection:
            if connection.execute("SELECT 1 FROM outbox WHERE update_id = ?", (update_id,)).fetchone():
                return False
            self._make_room(connection, len(body), now)
            key, sealed = self._database.vault.seal("outbox", place, body)
            connection.execute(
                "INSERT INTO outbox (update_id, order_id, run, round_number, kind, created, deadline, state,"
                " at_rest_key_id, sha256, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*columns, _OPEN, key, row_digest(place, key, sealed), sealed),
            )
            connection.execute("UPDATE orders SET update_id = ? WHERE order_id = ?", (update_id, order_id))
        return True

    def sealed(self, update_id: bytes, sealed: bytes, transfer: bytes, kem_key_id: bytes = b"") -> None:
        """Stores the bytes that will be sent, before they are sent: a restart sends the same ones.

        Args:
            kem_key_id: the cloud's key that they are sealed to.

        Raises:
            StorageError: the disk is full, no such open row, or `transfer` is not the SHA-256 of `sealed`.
        """
        if hashlib.sha256(sealed).digest() != transfer:
            raise StorageError("transfer digest is not that of the sealed bytes")
        with self._database.transaction() as connection:
            changed = connection.execute(
                "INSERT OR REPLACE INTO sealings (row, transfer, kem_key_id, sealed)"
                f" SELECT row, ?, ?, ? FROM outbox WHERE update_id = ? AND {_IS_OPEN}",
                (transfer, kem_key_id, sealed, update_id),
            ).rowcount
            if not changed:
                raise StorageError("no open outbox row with this update id", update_id=update_id.hex())

    def pending(self, *, limit: int = 64) -> list[OutboxRow]:
        """Open rows, oldest first. A row that fails its digest is quarantined, counted as `destroyed` and
        left out.
        """
        rows = self._database.read(f"{_SELECT} ORDER BY row LIMIT ?", (limit,))
        return [row for row in map(self._checked, rows) if row is not None]

    def owed(self) -> list[tuple[bytes, float]]:
        """(update id, deadline) of every open row, oldest first; one body at a time is looked at, as `pending` does."""
        numbers = self._database.read(f"SELECT row FROM outbox WHERE {_IS_OPEN} ORDER BY row")
        found = []
        for number in numbers:
            for values in self._database.read(f"{_SELECT} AND row = ?", number):
                row = self._checked(values)
                if row is not None:
                    found.append((row.update_id, row.deadline))
        return found

    def find(self, update_id: bytes) -> OutboxRow | None:
        """The open row of an update, or None (unknown, ended, or found damaged just now)."""
        rows = self._database.read(f"{_SELECT} AND update_id = ?", (update_id,))
        return self._checked(rows[0]) if rows else None

    def find_transfer(self, transfer: bytes) -> bytes | None:
        """The id of the open update whose sealed bytes have this SHA-256, or None. A receipt for missing chunks names
        only this.
        """
        rows = self._database.read(
            f"SELECT update_id FROM outbox JOIN sealings USING (row) WHERE transfer = ? AND {_IS_OPEN}",
            (transfer,),
        )
        return rows[0][0] if rows and isinstance(rows[0][0], bytes) else None

    def sealed_to_others(self, kem_key_ids: Collection[bytes]) -> list[bytes]:
        """Ids of open updates whose sealed bytes are for none of these keys, the oldest first."""
        rows = self._database.read(
            f"SELECT update_id, kem_key_id FROM outbox JOIN sealings USING (row) WHERE {_IS_OPEN} ORDER BY row"
        )
        return [update_id for update_id, kem_key_id in rows if kem_key_id not in kem_key_ids]

    def take_destroyed(self) -> list[DestroyedUpdate]:
        """What was found destroyed since the last call: whoever waits for it can be told."""
        taken, self._destroyed = self._destroyed, []
        return taken

    def end(
        self,
        update_id: bytes,
        verdict: str,
        *,
        transfer: bytes = b"",
        reason: str = "",
        now: float = 0.0,
        cloud_row: int = 0,
        durable: int = 0,
    ) -> bool:
        """Ends a row by a receipt, or by our own deadline.

        Args:
            verdict: a receipt's `stored`, `duplicate` (counted as stored) or `refused`; or our own `expired`.
            transfer: the receipt's digest of what the cloud received; `expired` needs none.
            cloud_row: the receipt's number of the row that the cloud committed; 0 when it promises no more than that.
            durable: rows of the cloud up to here are in a backup. A row above it is ended, and its body is kept until
                a later receipt says so, its deadline passes, or room is needed: a cloud that comes back from a backup
                is given it again (`offer_again`).

        Returns:
            False when nothing ended: no such open row, or its sealed bytes have another digest (a forged or
            stale receipt must not empty an outbox).
        """
        state = _VERDICTS.get(verdict)
        if state is None:
            return False
        with self._database.transaction() as connection:
            row = connection.execute(
                f"SELECT row, transfer FROM outbox LEFT JOIN sealings USING (row) WHERE update_id = ? AND {_IS_OPEN}",
                (update_id,),
            ).fetchone()
            if row is None or (state != "expired" and row[1] != transfer):
                return False
            _close(connection, row[0], state, reason, now, cloud_row=cloud_row if cloud_row > durable else 0)
            _drop_copies(connection, "cloud_row <= ?", (durable,))
        return True

    def note_durable(self, durable: int) -> None:
        """Lets go of the copies of rows that are in a backup now."""
        with self._database.transaction(durable=False) as connection:
            _drop_copies(connection, "cloud_row <= ?", (durable,))

    def offer_again(self) -> list[tuple[bytes, float]]:
        """Opens what was acknowledged and is in no backup: the cloud that has it is gone.

        Returns:
            (update id, deadline) of each, the oldest first. They are not counted as stored any more.
        """
        with self._database.transaction() as connection:
            rows: list[tuple[int, bytes, float]] = connection.execute(
                f"SELECT row, update_id, deadline FROM outbox WHERE {_IS_COPY} ORDER BY row"
            ).fetchall()
            for row, _, _ in rows:
                connection.execute(
                    "UPDATE outbox SET state = ?, reason = '', ended_at = 0, cloud_row = 0 WHERE row = ?",
                    (_OPEN, row),
                )
            connection.execute(
                "UPDATE outbox_totals SET total = total - ? WHERE state = 'stored'", (len(rows),)
            )
        return [(update_id, deadline) for _, update_id, deadline in rows]

    def copies(self) -> int:
        """How many acknowledged updates are kept until the cloud has a backup of them."""
        return int(self._database.read(f"SELECT count(*) FROM outbox WHERE {_IS_COPY}")[0][0])

    def expire(self, now: float) -> list[bytes]:
        """Ends the rows that are past their deadline; returns their update ids."""
        with self._database.transaction() as connection:
            return self._expire(connection, now)

    def destroy_all(self, reason: str, now: float) -> None:
        """Ends every open row as `destroyed`."""
        with self._database.transaction() as connection:
            for (row,) in connection.execute(f"SELECT row FROM outbox WHERE {_IS_OPEN}").fetchall():
                _close(connection, row, "destroyed", reason, now)

    def retire_keys(self) -> int:
        """Destroys the at-rest keys that no row needs any more; returns how many.

        Raises:
            StorageError: they may still be there; the next call tries again.
        """
        database = self._database
        asked = "SELECT 1 FROM outbox WHERE at_rest_key_id = ? LIMIT 1"
        with database.transaction(durable=False):
            return database.vault.retire("outbox", lambda key: bool(database.read(asked, (key,))))

    def depth(self) -> int:
        """How many rows are open."""
        return int(self._database.read(f"SELECT count(*) FROM outbox WHERE {_IS_OPEN}")[0][0])

    def open_bytes(self) -> int:
        """Bytes of bodies and sealed messages; `max_bytes` bounds them."""
        return int(self._database.read(_KEPT_BYTES)[0][0])

    def totals(self) -> dict[str, int]:
        """How many updates ended in each state since the database was made; every state is there."""
        counted = dict(self._database.read("SELECT state, total FROM outbox_totals"))
        return {state: int(counted.get(state, 0)) for state in END_STATES}

    def ended(self, update_id: bytes) -> tuple[str, str] | None:
        """(terminal state, reason) of an update that ended not long ago, else None."""
        rows = self._database.read(
            f"SELECT state, reason FROM outbox WHERE update_id = ? AND NOT ({_IS_OPEN})", (update_id,)
        )
        return (rows[0][0], rows[0][1]) if rows else None

    def _make_room(self, connection: sqlite3.Connection, needed_bytes: int, now: float) -> None:
        if _kept_bytes(connection) + needed_bytes <= self._max_bytes:
            return
        self._expire(connection, now)
        while (used_bytes := _kept_bytes(connection)) + needed_bytes > self._max_bytes and used_bytes:
            oldest = f"row = (SELECT min(row) FROM outbox WHERE {_IS_COPY})"
            if _drop_copies(connection, oldest, ()):
                continue
            (row,) = connection.execute(_FIRST_TO_GO).fetchone()
            _close(connection, row, "evicted", "the outbox was full", now)

    @staticmethod
    def _expire(connection: sqlite3.Connection, now: float) -> list[bytes]:
        late = connection.execute(
            f"SELECT row, update_id FROM outbox WHERE {_IS_OPEN} AND deadline < ? ORDER BY row", (now,)
        ).fetchall()
        for row, _ in late:
            _close(connection, row, "expired", "past its deadline", now)
        # Its round is over for a cloud that comes back, too.
        _drop_copies(connection, "deadline < ?", (now,))
        return [update_id for _, update_id in late]

    def _checked(self, values: tuple[Any, ...]) -> OutboxRow | None:
        number, *columns, key, digest, kept, sealed, transfer, kem_key_id = values
        update_id, order_id, run, round_number, kind, created, deadline = columns
        place = place_of_update(tuple(columns))
        if place is None or not is_intact(place, key, kept, digest):
            self._destroy(number, columns, kept, "damaged on disk")
            return None
        try:
            body = self._database.vault.open("outbox", key, place, kept)
        except StorageError as error:
            self._destroy(number, columns, kept, str(error))
            return None
        if sealed is not None and hashlib.sha256(sealed).digest() != transfer:
            # The body is intact, so nothing is lost: it is sealed again.
            sealed = transfer = kem_key_id = None
        return OutboxRow(
            number,
            update_id,
            order_id,
            run,
            round_number,
            kind,
            body,
            sealed,
            transfer,
            created,
            deadline,
            kem_key_id if isinstance(kem_key_id, bytes) else b"",
        )

    def _destroy(self, row: int, columns: list[Any], kept: Any, reason: str) -> None:
        """What lies there is sealed, or no longer what was written: a person may look at it, nobody sends it."""
        update_id = columns[0]
        name = f"outbox-{update_id.hex()}" if isinstance(update_id, bytes) else f"outbox-row-{row}"
        data = kept if isinstance(kept, bytes) else repr(kept).encode()
        self._database.quarantine.keep(name, data, f"outbox row: {reason}")
        with self._database.transaction() as connection:
            _close(connection, row, "destroyed", reason, 0.0)
        # The row's own columns may be what is damaged; the order book has them, too.
        asked = "SELECT order_id, run, round_number FROM orders WHERE update_id = ?"
        for order_id, run, round_number in self._database.read(asked, (update_id,)):
            self._destroyed.append(DestroyedUpdate(order_id, run, round_number, reason))
        _log.error("update_destroyed", update=name.removeprefix("outbox-"), reason=reason)


def _close(
    connection: sqlite3.Connection, row: int, state: EndState, reason: str, now: float, *, cloud_row: int = 0
) -> None:
    """The only place where a row leaves the open state; the condition makes it happen once.

    Args:
        cloud_row: above 0: the body is kept as a copy of that row of the cloud.
    """
    # One statement: each writes the whole row again.
    kept = "" if cloud_row else ", at_rest_key_id = '', body = x''"
    changed = connection.execute(
        f"UPDATE outbox SET state = ?, reason = ?, ended_at = ?, cloud_row = ?{kept} WHERE row = ? AND {_IS_OPEN}",
        (state, reason[:512], now, cloud_row, row),
    ).rowcount
    if not changed:
        return
    connection.execute("DELETE FROM sealings WHERE row = ?", (row,))
    connection.execute(
        "INSERT INTO outbox_totals VALUES (?, 1) ON CONFLICT (state) DO UPDATE SET total = total + 1",
        (state,),
    )
    connection.execute(
        f"DELETE FROM outbox WHERE NOT ({_IS_OPEN}) AND cloud_row = 0 AND row <= ?", (row - ENDED_ROWS_KEPT,)
    )


def _drop_copies(connection: sqlite3.Connection, condition: str, parameters: tuple[float, ...]) -> int:
    """Lets go of copies of acknowledged rows; the rows are ended already, and stay so."""
    return connection.execute(
        f"UPDATE outbox SET cloud_row = 0, at_rest_key_id = '', body = x'' WHERE {_IS_COPY} AND {condition}",
        parameters,
    ).rowcount


def _kept_bytes(connection: sqlite3.Connection) -> int:
    return int(connection.execute(_KEPT_BYTES).fetchone()[0])
