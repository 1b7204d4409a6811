"""The windows that the device learns from: bounded, forgettable, and never sent anywhere.

Laws of the file: raw samples stay here (law 7); what was forgotten is overwritten on disk and leaves only a
tombstone with its id; ids are never used twice; each row carries a digest over window, label and split.
The store is a cache of what the device saw: when it is full the oldest goes, and a damaged row is dropped.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_agent.storage import Database
from wire.errors import DataError

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
# What SQLite adds to a row of this table (header, key, digest), for the cap.
_ROW_BYTES: Final = 96
_DROP_AT_ONCE: Final = 64


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
        digest = _digest(data, self._precision, shape, label, split)
        with self._lock, self._database.transaction(durable=False) as connection:
            self._make_room(connection, len(data) + _ROW_BYTES, now)
            row = connection.execute(
                "INSERT INTO samples (window, dtype, shape, label, split, created, consent, sha256)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (data, self._precision, shape, label, split, now, consent, digest),
            ).lastrowid
        self._bytes += len(data) + _ROW_BYTES
        return int(row or 0)

    def label(self, sample_id: int, label: int) -> bool:
        """Sets or corrects the label of a sample; False when it is not (or no longer) there.

        Raises:
            DataError: a label that cannot be.
        """
        _check_label(label)
        with self._database.transaction(durable=False) as connection:
            row = connection.execute(
                "SELECT window, dtype, shape, split FROM samples WHERE id = ?", (sample_id,)
            ).fetchone()
            if row is None:
                return False
            digest = _digest(row[0], row[1], row[2], label, row[3])
            connection.execute(
                "UPDATE samples SET label = ?, sha256 = ? WHERE id = ?", (label, digest, sample_id)
            )
        return True

    def forget(self, sample_id: int, now: float = 0.0) -> bool:
        """Erases one sample for good; its id stays as a tombstone. False when it is not there.

        On disk when it returns, with the bytes overwritten in the database file.
        """
        with self._lock:
            with self._database.transaction() as connection:
                row = connection.execute(
                    "DELETE FROM samples WHERE id = ? RETURNING length(window)", (sample_id,)
                ).fetchone()
                if row is None:
                    return False
                connection.execute("INSERT OR IGNORE INTO tombstones VALUES (?, ?)", (sample_id, now))
            self._bytes = max(0, self._bytes - row[0] - _ROW_BYTES)
        self._database.erase_leftovers()
        return True

    def was_forgotten(self, sample_id: int) -> bool:
        """Whether a sample of this id was erased on demand."""
        return bool(self._database.read("SELECT 1 FROM tombstones WHERE id = ?", (sample_id,)))

    def labelled(self, split: Split, *, shape: tuple[int, ...] | None = None) -> tuple[Floats, Integers]:
        """All labelled windows of a split, oldest first: (float32 [N, …], int64 [N]).

        Args:
            shape: of one window; None takes the newest window's. Windows of another shape are left out
                (they are from before a change of model).
        """
        return self._load(split, shape, "AND label IS NOT NULL")

    def windows(self, split: Split, *, shape: tuple[int, ...] | None = None) -> tuple[Floats, Integers]:
        """All windows of a split, for a task without labels; unknown labels are −1."""
        return self._load(split, shape, "")

    def counts(self) -> dict[str, int]:
        """`samples`, `labelled`, `train`, `val` (labelled ones), `bytes`."""
        rows = self._database.read(
            "SELECT split, count(*), count(label), total(length(window)) FROM samples GROUP BY split"
        )
        by_split = {split: labelled for split, _, labelled, _ in rows}
        return {
            "samples": sum(row[1] for row in rows),
            "labelled": sum(row[2] for row in rows),
            "train": by_split.get("train", 0),
            "val": by_split.get("val", 0),
            "bytes": int(sum(row[3] for row in rows)),
        }

    def expire(self, now: float) -> int:
        """Drops what is past its retention; returns how many."""
        with self._lock, self._database.transaction(durable=False) as connection:
            return self._drop(connection, "created < ?", (now - self._retention_seconds,))

    def _encode(self, window: Floats) -> tuple[bytes, str]:
        array = np.asarray(window)
        if array.size == 0 or not np.issubdtype(array.dtype, np.number) or not np.isfinite(array).all():
            raise DataError("a window must hold finite numbers", shape=array.shape)
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array, dtype=_DTYPES[self._precision])
        if not np.isfinite(stored).all():
            raise DataError(f"a window holds values beyond {self._precision}", shape=array.shape)
        if stored.nbytes + _ROW_BYTES > self._max_bytes:
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
            "SELECT total(length(window)) + count(*) * ? FROM samples", (_ROW_BYTES,)
        ).fetchone()[0]
        self._bytes, self._epoch = int(total), self._database.epoch

    def _drop(self, connection: sqlite3.Connection, condition: str, parameters: tuple[Any, ...]) -> int:
        sizes = connection.execute(
            f"DELETE FROM samples WHERE {condition} RETURNING length(window)", parameters
        ).fetchall()
        self._bytes = max(0, self._bytes - sum(size + _ROW_BYTES for (size,) in sizes))
        self.dropped_total += len(sizes)
        return len(sizes)

    def _load(self, split: str, shape: tuple[int, ...] | None, condition: str) -> tuple[Floats, Integers]:
        wanted = ",".join(map(str, shape)) if shape is not None else self._newest_shape(split)
        rows = self._database.read(
            f"SELECT window, label, sha256, dtype, id FROM samples WHERE split = ? AND shape = ? {condition}"
            " ORDER BY id",
            (split, wanted),
        )
        good = [row for row in rows if _is_intact(row, wanted, split)]
        if len(good) < len(rows):
            self._drop_damaged(rows, good)
        axes = tuple(int(axis) for axis in wanted.split(",") if axis)
        labels = np.array([UNLABELLED if row[1] is None else row[1] for row in good], dtype=np.int64)
        return _join(good, axes), labels

    def _newest_shape(self, split: str) -> str:
        rows = self._database.read(
            "SELECT shape FROM samples WHERE split = ? ORDER BY id DESC LIMIT 1", (split,)
        )
        return str(rows[0][0]) if rows else ""

    def _drop_damaged(self, rows: list[Any], good: list[Any]) -> None:
        kept = {row[4] for row in good}
        damaged = [row[4] for row in rows if row[4] not in kept]
        self.damaged_total += len(damaged)
        # Samples are personal: a damaged one is dropped, never copied to the quarantine.
        with self._lock, self._database.transaction(durable=False) as connection:
            for sample_id in damaged:
                self._drop(connection, "id = ?", (sample_id,))


def _check_label(label: int | None) -> None:
    if label is not None and (isinstance(label, bool) or not 0 <= label <= MAX_LABEL):
        raise DataError(f"no label {label!r}", hint=f"a class number, 0 to {MAX_LABEL}")


def _digest(data: bytes, dtype: str, shape: str, label: int | None, split: str) -> bytes:
    state = hashlib.sha256(f"{dtype}\0{shape}\0{label}\0{split}\0".encode())
    state.update(data)
    return state.digest()


def _is_intact(row: Any, shape: str, split: str) -> bool:
    data, label, digest, dtype = row[:4]
    return (
        isinstance(data, bytes) and dtype in _DTYPES and _digest(data, dtype, shape, label, split) == digest
    )


def _join(rows: list[Any], axes: tuple[int, ...]) -> Floats:
    """One copy: the blobs in a row, read as one array (two when both precisions are on disk)."""
    if not rows:
        return np.zeros((0, *axes), dtype=np.float32)
    if len({row[3] for row in rows}) == 1:
        joined = np.frombuffer(bytearray().join(row[0] for row in rows), dtype=_DTYPES[rows[0][3]])
        return np.ascontiguousarray(joined, dtype=np.float32).reshape(len(rows), *axes)
    arrays = [np.frombuffer(row[0], dtype=_DTYPES[row[3]]).astype(np.float32) for row in rows]
    return np.stack(arrays).reshape(len(rows), *axes)
