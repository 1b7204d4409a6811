"""What a helper must not forget: whose seeds it takes, and which question of each round it has answered.

Laws of the file: a round has one answered question, for ever; `note_answered` is on the disk when it returns; a device
of the roster has one key, and a key one device. Nothing that a seed or a mask could be made from is kept. Source:
docs/protocol.md, clause 15.6.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wire.errors import ConfigurationError, StorageError

MEMORY: Final = ":memory:"
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS devices (
    device TEXT PRIMARY KEY, key BLOB NOT NULL UNIQUE, added_at REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS answers (
    run TEXT NOT NULL, life INTEGER NOT NULL, round INTEGER NOT NULL, question BLOB NOT NULL,
    devices INTEGER NOT NULL, answered_at REAL NOT NULL, PRIMARY KEY (run, life, round)
) STRICT;
"""
_WAIT_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class RoundName:
    """A round as a helper tells rounds apart: `life` is that of the cloud (`wire.mask_terms.HelpedTerms`)."""

    run: str
    life: int
    number: int


@dataclass(frozen=True, slots=True)
class RosterRow:
    """A device whose seeds are summed; `key` is its update key, 32 bytes."""

    device: str
    key: bytes
    added_at: float


class HelperStore:
    """The helper's database. Safe to use from many threads; another process may change the roster meanwhile.

    Raises:
        StorageError: (disk) it cannot be opened, or is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self._lock = threading.RLock()
        with _translated(path):
            self._connection = sqlite3.connect(
                path, isolation_level=None, timeout=_WAIT_SECONDS, check_same_thread=False
            )
            # An answer that a power cut took back could be given twice.
            self._connection.execute("PRAGMA synchronous = EXTRA")
            self._connection.executescript(_SCHEMA)
        self._path = path

    def close(self) -> None:
        """Ends the use of it."""
        with self._lock:
            self._connection.close()

    # ---- the roster --------------------------------------------------------------------------------------------

    def add(self, devices: Iterable[tuple[str, bytes]], now: float) -> int:
        """Takes devices into the roster, all of them or none; returns how many are new.

        Raises:
            ConfigurationError: (operator) a device with another key, or a key of another device; nothing was added.
        """
        count = 0
        with self._transaction() as connection:
            for device, key in devices:
                known = connection.execute(
                    "SELECT device, key FROM devices WHERE device = ? OR key = ?", (device, key)
                ).fetchall()
                if known and known != [(device, key)]:
                    raise ConfigurationError(
                        f"{device} or its key is in the roster already, with another",
                        hint="ask who runs the device; `shoal-cloud helper device remove` first, if it has a new key",
                        device=device,
                    )
                if not known:
                    connection.execute("INSERT INTO devices VALUES (?, ?, ?)", (device, key, now))
                    count += 1
        return count

    def remove(self, device: str) -> bool:
        """Whether it was in the roster."""
        with self._transaction() as connection:
            return connection.execute("DELETE FROM devices WHERE device = ?", (device,)).rowcount > 0

    def roster(self) -> list[RosterRow]:
        """All devices, by name."""
        with self._lock, _translated(self._path):
            rows = self._connection.execute("SELECT device, key, added_at FROM devices ORDER BY device")
            return [RosterRow(device, bytes(key), added_at) for device, key, added_at in rows]

    # ---- what was answered -------------------------------------------------------------------------------------

    def answered(self, named: RoundName) -> bytes:
        """SHA-256 of the question of a round that was answered; empty before."""
        with self._lock, _translated(self._path):
            row = self._connection.execute(
                "SELECT question FROM answers WHERE run = ? AND life = ? AND round = ?",
                (named.run, named.life, named.number),
            ).fetchone()
        return bytes(row[0]) if row is not None else b""

    def newest_life(self, run: str) -> int:
        """The newest life of the cloud in which a round of a run was answered; 0 before the first."""
        with self._lock, _translated(self._path):
            (life,) = self._connection.execute(
                "SELECT max(life) FROM answers WHERE run = ?", (run,)
            ).fetchone()
        return int(life or 0)

    def note_answered(self, named: RoundName, question: bytes, *, devices: int, now: float) -> bool:
        """Says that this question, and no other of its round, is answered; False when another one is."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (named.run, named.life, named.number, question, devices, now),
            )
        return self.answered(named) == question

    def summary(self) -> tuple[int, float]:
        """How many rounds were answered, and when the newest of them; 0 before the first."""
        with self._lock, _translated(self._path):
            count, last = self._connection.execute(
                "SELECT count(*), max(answered_at) FROM answers"
            ).fetchone()
        return int(count), float(last or 0.0)

    # ---- inside ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _translated(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")


@contextlib.contextmanager
def _translated(path: Path | str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(f"the helper's database {path} cannot be used: {error}", path=str(path)) from error
