"""The windows that the device learns from: bounded, forgettable, and never sent anywhere.

Laws of the file: raw samples stay here (law 7), sealed with a key of their day that goes when the last of that day
has gone; what was forgotten is overwritten on disk, what else its key sealed gets another, so that no copy of the
file gives it back, and it leaves only a tombstone with its id; ids are never used twice; each row carries a digest.
The store is a cache of what the device saw: when it is full the oldest goes, and a damaged row is dropped.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_agent.store.key_store import SEALED_EXTRA_BYTES
from edge_agent.store.sealed_rows import (
    LABEL_BYTES,
    is_intact,
    place_of_sample,
    row_digest,
    sample_place,
    split_label,
    with_label,
)
from edge_agent.store.storage import Database
from process.logs import get_logger
from wire.errors import DataError, StorageError

_log = get_logger("edge_agent.store.samples")

Split = Literal["train", "val"]
Precision = Literal["float32", "float16"]
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

UNLABELLED: Final = -1
DEFAULT_MAX_BYTES: Final = 64 * 1024 * 1024
DEFAULT_RETENTION_SECONDS: Final = 30 * 86_400.0
MAX_LABEL: Final = 65_535
_SPLITS: Final = get_args(Split)
_DTYPES: Final[dict[str, np.dtype[Any]]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
# What sealing adds to a window, and what is sealed with it.
_SEALED_BYTES: Final = SEALED_EXTRA_BYTES + LABEL_BYTES
# What a row of this table takes besides its window (header, key, digest, seal), for the cap.
ROW_BYTES: Final = 144
_DROP_AT_ONCE: Final = 64
# Rows that are opened at a time: what is read of the disk is let go before the next are.
_READ_AT_ONCE: Final = 256
_COLUMNS: Final = "id, split, labelled, created, dtype, shape, consent"
_SELECT: Final = f"SELECT {_COLUMNS}, at_rest_key_id, sha256, window FROM samples"
_WINDOW_BYTES: Final = f"max(0, length(window) - {_SEALED_BYTES})"

# Columns, key, window (raw bytes), label.
_Opened = tuple[tuple[Any, ...], str, bytes, int | None]


class SampleStore:
    """The sample store of one device. Safe to use from several threads.

    Args:
        max_bytes: cap over all windows; above it the oldest go, labelled or not.
        retention_seconds: older windows go, whether or not there is room.
        precision: how windows are kept on disk; `float16` halves the space (and rounds).
    """

    def __init__(
        self,
        database: Database,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        retention_seconds: float = DEFAULT_RETENTION_SECONDS,
        precision: Precision = "float32",
    ) -> None:
        self._database = database
        self._max_bytes = max_bytes
        self._retention_seconds = retention_seconds
        self._precision = precision
        self._lock = threading.RLock()
        self._epoch = 0
        self._bytes = 0
        self.dropped_total = 0
        self.damaged_total = 0
        self._drop_unreadable()

    def add(
        self, window: Floats, label: int | None, now: float, split: Split = "train", *, consent: str = ""
    ) -> int:
        """Keeps one window.

        Args:
            window: float32 of one sample's shape (no batch axis), all finite.
            label: class number, or None when it is not known (yet).
            now: seconds since 1970.
            split: `train`, or `val` for what the device never trains on.
            consent: id of the consent under which the sample may be used for more than local learning.

        Returns:
            The sample's id, never used again by this database.

        Raises:
            DataError: not finite, empty, larger than the store, or a label or split that cannot be.
            StorageError: the disk is full (older samples stay).
        """
        data, shape = self._encode(window)
        _check_label(label)
        if split not in _SPLITS:
            raise DataError(f"no split {split!r}", hint=f"one of {', '.join(_SPLITS)}")
        with self._lock, self._database.transaction(durable=False) as connection:
            self._make_room(connection, len(data) + ROW_BYTES, now)
            sample_id = _next_id(connection)
            columns = (sample_id, split, int(label is not None), now, self._precision, shape, consent)
            place = sample_place(*columns)
            key, sealed = self._database.vault.seal("samples", place, with_label(data, label))
            connection.execute(
                f"INSERT INTO samples ({_COLUMNS}, at_rest_key_id, sha256, window)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*columns, key, row_digest(place, key, sealed), sealed),
            )
        self._bytes += len(data) + ROW_BYTES
        return sample_id

    def label(self, sample_id: int, label: int) -> bool:
        """Sets or corrects the label of a sample; False when it is not (or no longer) there.

        Raises:
            DataError: a label that cannot be.
        """
        _check_label(label)
        with self._lock, self._database.transaction(durable=False) as connection:
            rows = self._opened(connection.execute(f"{_SELECT} WHERE id = ?", (sample_id,)).fetchall())
            for columns, key, window, _ in rows:
                self._write_again(connection, columns, key, window, label)
        return bool(rows)

    def forget(self, sample_id: int, now: float = 0.0) -> bool:
        """Erases one sample for good; its id stays as a tombstone. False when it is not there.

        On disk when it returns, with the bytes overwritten in the database file, and with its key destroyed: what
        else was sealed with that key has another.
        """
        with self._lock:
            with self._database.transaction() as connection:
                row = connection.execute(
                    f"DELETE FROM samples WHERE id = ? RETURNING {_WINDOW_BYTES}, at_rest_key_id",
                    (sample_id,),
                ).fetchone()
                if row is None:
                    return False
                connection.execute("INSERT OR IGNORE INTO tombstones VALUES (?, ?)", (sample_id, now))
            self._bytes = max(0, self._bytes - row[0] - ROW_BYTES)
            try:
                self._replace_key(str(row[1]))
            except StorageError as error:
                # Gone from this file all the same; only a copy that was made before can still be read.
                _log.error("key_not_destroyed", reason=str(error))
        self._database.erase_leftovers()
        return True

    def forget_all(self, now: float) -> None:
        """Deletes every sample; the ids stay as tombstones. Who wants copies unreadable destroys the keys first."""
        with self._lock, self._database.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO tombstones SELECT id, ? FROM samples", (now,))
            connection.execute("DELETE FROM samples")
            self._bytes = 0

    def _replace_key(self, key: str) -> None:
        vault = self._database.vault
        if not vault.knows(key):
            return
        renewed = vault.replace(key)
        with self._database.transaction() as connection:
            ids = connection.execute("SELECT id FROM samples WHERE at_rest_key_id = ?", (key,)).fetchall()
            for each in ids:
                found = self._opened(connection.execute(f"{_SELECT} WHERE id = ?", each).fetchall())
                for columns, _, window, label in found:
                    self._write_again(connection, columns, renewed, window, label)
        vault.destroy([key])

    def _write_again(
        self,
        connection: sqlite3.Connection,
        columns: tuple[Any, ...],
        key: str,
        window: bytes,
        label: int | None,
    ) -> None:
        sample_id, split, _, *rest = columns
        columns = (sample_id, split, int(label is not None), *rest)
        place = sample_place(*columns)
        sealed = self._database.vault.seal_with(key, place, with_label(window, label))
        connection.execute(
            "UPDATE samples SET labelled = ?, at_rest_key_id = ?, sha256 = ?, window = ? WHERE id = ?",
            (columns[2], key, row_digest(place, key, sealed), sealed, sample_id),
        )

    def was_forgotten(self, sample_id: int) -> bool:
        """Whether a sample of this id was erased on demand."""
        return bool(self._database.read("SELECT 1 FROM tombstones WHERE id = ?", (sample_id,)))

    def labelled(self, split: Split, *, shape: tuple[int, ...] | None = None) -> tuple[Floats, Integers]:
        """All labelled windows of a split, oldest first: (float32 [N, …], int64 [N]).

        Args:
            shape: of one window; None takes the newest window's. Windows of another shape are left out
                (they are from before a change of model).
        """
        return self._load(split, shape, "AND labelled")

    def windows(self, split: Split, *, shape: tuple[int, ...] | None = None) -> tuple[Floats, Integers]:
        """All windows of a split, for a task without labels; unknown labels are −1."""
        return self._load(split, shape, "")

    def counts(self) -> dict[str, int]:
        """`samples`, `labelled`, `train`, `val` (labelled ones), `bytes`."""
        rows = self._database.read(
            f"SELECT split, count(*), total(labelled), total({_WINDOW_BYTES}) FROM samples GROUP BY split"
        )
        by_split = {split: int(labelled) for split, _, labelled, _ in rows}
        return {
            "samples": sum(row[1] for row in rows),
            "labelled": int(sum(row[2] for row in rows)),
            "train": by_split.get("train", 0),
            "val": by_split.get("val", 0),
            "bytes": int(sum(row[3] for row in rows)),
        }

    def expire(self, now: float) -> int:
        """Drops what is past its retention; returns how many."""
        with self._lock, self._database.transaction(durable=False) as connection:
            return self._drop(connection, "created < ?", (now - self._retention_seconds,))

    def retire_keys(self) -> int:
        """Destroys the keys of days of which nothing is left; returns how many.

        Raises:
            StorageError: they may still be there; the next call tries again.
        """
        database = self._database
        asked = "SELECT 1 FROM samples WHERE at_rest_key_id = ? LIMIT 1"
        with self._lock, database.transaction(durable=False):
            return database.vault.retire("samples", lambda key: bool(database.read(asked, (key,))))

    def _encode(self, window: Floats) -> tuple[bytes, str]:
        array = np.asarray(window)
        if array.size == 0 or not np.issubdtype(array.dtype, np.number) or not np.isfinite(array).all():
            raise DataError("a window must hold finite numbers", shape=array.shape)
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array, dtype=_DTYPES[self._precision])
        if not np.isfinite(stored).all():
            raise DataError(f"a window holds values beyond {self._precision}", shape=array.shape)
        if stored.nbytes + ROW_BYTES > self._max_bytes:
            raise DataError(
                "a window is larger than the sample store",
                size_bytes=stored.nbytes,
                limit_bytes=self._max_bytes,
            )
        return stored.tobytes(), ",".join(map(str, array.shape))

    def _make_room(self, connection: sqlite3.Connection, needed_bytes: int, now: float) -> None:
        if self._epoch != self._database.epoch:
            self._recount(connection)
        oldest = connection.execute("SELECT created FROM samples ORDER BY id LIMIT 1").fetchone()
        if oldest is not None and oldest[0] < now - self._retention_seconds:
            self._drop(connection, "created < ?", (now - self._retention_seconds,))
        while self._bytes + needed_bytes > self._max_bytes:
            # A few at a time: at the cap, every further window would cost its own scan for the oldest.
            share = max(1, min(_DROP_AT_ONCE, self._max_bytes // (needed_bytes * 16)))
            oldest_ids = "id IN (SELECT id FROM samples ORDER BY id LIMIT ?)"
            if not self._drop(connection, oldest_ids, (share,)):
                self._bytes = 0

    def _recount(self, connection: sqlite3.Connection) -> None:
        total = connection.execute(
            f"SELECT total({_WINDOW_BYTES}) + count(*) * ? FROM samples", (ROW_BYTES,)
        ).fetchone()[0]
        self._bytes, self._epoch = int(total), self._database.epoch

    def _drop(self, connection: sqlite3.Connection, condition: str, parameters: tuple[Any, ...]) -> int:
        sizes = connection.execute(
            f"DELETE FROM samples WHERE {condition} RETURNING {_WINDOW_BYTES}", parameters
        ).fetchall()
        self._bytes = max(0, self._bytes - sum(size + ROW_BYTES for (size,) in sizes))
        self.dropped_total += len(sizes)
        return len(sizes)

    def _load(self, split: str, shape: tuple[int, ...] | None, condition: str) -> tuple[Floats, Integers]:
        wanted = ",".join(map(str, shape)) if shape is not None else self._newest_shape(split)
        axes = tuple(int(axis) for axis in wanted.split(",") if axis)
        where = f"split = ? AND shape = ? {condition}"
        count = self._database.read(f"SELECT count(*) FROM samples WHERE {where}", (split, wanted))[0][0]
        # One array for all: what is read of the disk is let go piece by piece.
        windows, last = np.empty((count, *axes), np.float32), 0
        labels: list[int] = []
        sql = f"{_SELECT} WHERE {where} AND id > ? ORDER BY id LIMIT ?"
        while rows := self._database.read(
            sql, (split, wanted, last, min(_READ_AT_ONCE, count - len(labels)))
        ):
            last = rows[-1][0]
            for columns, _, window, label in self._opened(rows):
                stored = np.frombuffer(window, _DTYPES[columns[4]])
                windows[len(labels)] = stored.reshape(axes)
                labels.append(UNLABELLED if label is None else label)
        return windows[: len(labels)], np.array(labels, dtype=np.int64)

    def _opened(self, rows: list[Any]) -> list[_Opened]:
        """What rows hold; those that are damaged, or whose key is gone, are dropped."""
        opened: list[_Opened] = []
        damaged = []
        for *columns, key, digest, sealed in rows:
            place = place_of_sample(tuple(columns))
            if place is None or columns[4] not in _DTYPES or not is_intact(place, key, sealed, digest):
                damaged.append(columns[0])
                continue
            try:
                window, label = split_label(self._database.vault.open("samples", key, place, sealed))
            except StorageError:
                damaged.append(columns[0])
                continue
            opened.append((tuple(columns), key, window, label))
        if damaged:
            self._drop_damaged(damaged)
        return opened

    def _drop_unreadable(self) -> None:
        """What was sealed with a key that is lost must not count as something to train on."""
        # A database that is damaged is replaced by the first call that meets it; there is time for that later.
        with contextlib.suppress(StorageError):
            keys = [key for (key,) in self._database.read("SELECT DISTINCT at_rest_key_id FROM samples")]
            lost = [key for key in keys if not self._database.vault.knows(key)]
            if not lost:
                return
            with self._lock, self._database.transaction(durable=False) as connection:
                dropped = sum(self._drop(connection, "at_rest_key_id = ?", (key,)) for key in lost)
            self.damaged_total += dropped
            _log.error("samples_unreadable", dropped=dropped, reason="their key is lost")

    def _newest_shape(self, split: str) -> str:
        rows = self._database.read(
            "SELECT shape FROM samples WHERE split = ? ORDER BY id DESC LIMIT 1", (split,)
        )
        return str(rows[0][0]) if rows else ""

    def _drop_damaged(self, damaged: list[Any]) -> None:
        self.damaged_total += len(damaged)
        _log.error("samples_damaged", dropped=len(damaged))
        # Samples are personal: a damaged one is dropped, never copied to the quarantine.
        with self._lock, self._database.transaction(durable=False) as connection:
            for sample_id in damaged:
                self._drop(connection, "id = ?", (sample_id,))


def _next_id(connection: sqlite3.Connection) -> int:
    """The id that the next row gets: it is sealed before it is there."""
    found = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'samples'").fetchone()
    newest = connection.execute("SELECT max(id) FROM samples").fetchone()[0]
    return 1 + max(found[0] if found else 0, newest or 0)


def _check_label(label: int | None) -> None:
    if label is not None and (isinstance(label, bool) or not 0 <= label <= MAX_LABEL):
        raise DataError(f"no label {label!r}", hint=f"a class number, 0 to {MAX_LABEL}")
