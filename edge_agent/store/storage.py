"""`agent.db`, the device's one database: connection, schema, format version, and what a damaged file becomes.

Laws of the file: a damaged file never stops the agent (it goes to the quarantine and a fresh one, with a
higher epoch, takes its place). What the rows mean is the business of `outbox.py`, `samples.py`, `orders.py`,
`sequence.py` and `time_floor.py`.

Threads: one connection behind one re-entrant lock, shared by all threads of the agent. Transactions are short
(one row or one query), so this is simpler than a connection per thread and as fast. What must survive a power
cut commits with synchronous=FULL; samples with NORMAL, so that no fsync stands in the way of an inference.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from edge_agent.store.at_rest import KEY_ID_CHARACTERS, Vault, open_vault
from edge_agent.store.conversion import seal_plain_database
from edge_agent.store.disk import write_durably
from edge_agent.store.foreign import put_foreign_away
from edge_agent.store.log_mending import LOG_SUFFIX, mend_log
from edge_agent.store.quarantine import FOLDER_NAME, Quarantine
from edge_agent.store.salvage import lenient_text, salvage
from edge_agent.store.schema import FORMAT_VERSION, PAGE_BYTES, create, is_ours, version_of
from process.clock import Clock, SystemClock
from process.logs import get_logger
from wire.errors import StorageError

_log = get_logger("edge_agent.store.storage")

DATABASE_NAME: Final = "agent.db"
MEMORY: Final = ":memory:"
DEFAULT_MAX_BYTES: Final = 256 * 1024 * 1024
_FORMAT_NAME: Final = "FORMAT"
_FORMAT: Final = "shoal-edge 1"
_EPOCH_NAME: Final = "EPOCH"
_MAX_EPOCH: Final = 2**53
# A simulated fleet holds a thousand databases in one process: small pages, and one costs 98 kB, not 140.
_MEMORY_PAGE_BYTES: Final = 1024
# SQLite would keep 2 MiB of pages for good; samples are read once a round, and the system has the pages too.
_CACHE_KIB: Final = 256
_WAL_LIMIT_BYTES: Final = 4 * 1024 * 1024
_SQLITE_SUFFIXES: Final = ("", LOG_SUFFIX, "-shm")
_DAMAGED_SUFFIX: Final = ".damaged"
_NO_ROOM: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_DAMAGED: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


Connect = Callable[..., sqlite3.Connection]
"""`sqlite3.connect`, or a simulator's in its place, whose commits can be cut in the middle."""


class _DamagedError(sqlite3.DatabaseError):
    """The file is SQLite's, its content is not ours."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


class Database:
    """One device's database. Made by `open_database`; safe to use from several threads.

    Attributes:
        vault: what its rows are sealed with.
    """

    def __init__(
        self,
        path: Path | None,
        quarantine: Quarantine,
        vault: Vault,
        *,
        max_bytes: int,
        clock: Clock,
        connect: Connect = sqlite3.connect,
        must_salvage: bool = False,
    ) -> None:
        self.path = path
        self._connect = connect
        self.quarantine = quarantine
        self.vault = vault
        self.recovered_total = 0
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.RLock()
        self._depth = 0
        self._is_read_only = False
        self._durable = True
        self._epoch = 0
        self.salvaged: dict[str, int] = {}
        self._connection = self._open_or_replace(must_salvage)
        try:
            self._settle_epoch()
        except StorageError as error:
            # Damage that shows only here was dealt with: a fresh database with a new epoch is in place.
            if not error.facts.get("damaged"):
                raise

    @property
    def epoch(self) -> int:
        """Names this incarnation of the database; grows whenever a fresh one had to be made."""
        return self._epoch

    @property
    def is_in_transaction(self) -> bool:
        """Whether the calling thread is inside of a transaction, which may still fail."""
        with self._lock:
            return self._depth > 0

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """All or nothing; may be nested (the outermost commits, and decides about `durable`).

        Args:
            durable: on disk before it returns (fsync); False may lose the last seconds at a power cut, never
                tear.

        Raises:
            StorageError: the disk is full, or the file is damaged (a fresh one is in place for the next
                call).
        """
        with self._lock:
            if self._depth:
                yield self._connection
                return
            if self._is_read_only:
                self._open_again()
            with self._translated():
                self._set_durable(durable)
                self._connection.execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                with self._translated():
                    yield self._connection
                    self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                raise
            finally:
                self._depth = 0

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """All rows of one query, as tuples.

        Raises:
            StorageError: the file is damaged (a fresh one is in place for the next call) or cannot be read.
        """
        with self._lock, self._translated():
            return self._connection.execute(sql, parameters).fetchall()

    def fact(self, name: str) -> int | float | str | bytes | None:
        """A named value of the `facts` table; None when it is not there, or does not match its digest."""
        rows = self.read("SELECT value, sha256 FROM facts WHERE name = ?", (name,))
        if not rows or _fact_digest(name, rows[0][0]) != rows[0][1]:
            return None
        value: int | float | str | bytes = rows[0][0]
        return value

    def set_fact(self, name: str, value: int | float | str | bytes, *, durable: bool = True) -> None:
        """Writes a named value; raises like `transaction`."""
        with self.transaction(durable=durable) as connection:
            connection.execute(
                "INSERT OR REPLACE INTO facts VALUES (?, ?, ?)", (name, value, _fact_digest(name, value))
            )

    def secret_fact(self, name: str) -> bytes | None:
        """What `set_secret_fact` kept; None when it is not there, is damaged, or its key is gone."""
        kept = self.fact(name)
        if not isinstance(kept, bytes):
            return None
        key, sealed = kept[:KEY_ID_CHARACTERS].decode("ascii", "replace"), kept[KEY_ID_CHARACTERS:]
        try:
            return self.vault.open("facts", key, name.encode(), sealed)
        except StorageError:
            return None

    def set_secret_fact(self, name: str, value: bytes) -> None:
        """Writes a named value that says something about the device's data: sealed. Raises like `transaction`."""
        key, sealed = self.vault.seal("facts", name.encode(), value)
        self.set_fact(name, key.encode("ascii") + sealed)

    def reserve_numbers(self, count: int) -> tuple[int, int]:
        """Takes `count` numbers of this epoch out of use, on disk; returns (epoch, the first of them).

        Raises:
            StorageError: they could not be reserved, so none may be used.
        """
        with self.transaction():
            reserved = self.fact("reserved_seq")
            if not isinstance(reserved, int):
                self._begin_epoch()
                reserved = 0
            self.set_fact("reserved_seq", reserved + count)
            return self._epoch, reserved + 1

    def erase_leftovers(self) -> None:
        """Empties the write-ahead log, so that what was deleted stands nowhere in the file (`secure_delete`
        is on).
        """
        with self._lock, self._translated():
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Safe to call twice."""
        with self._lock:
            self._connection.close()

    def _set_durable(self, durable: bool) -> None:
        if durable != self._durable and self.path is not None:
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            # SQLite's own message quotes bytes of the file.
            self._recover()
            raise _storage_error(_DamagedError(str(error)), self.path) from error
        except sqlite3.Error as error:
            if _code(error) in _DAMAGED:
                self._recover()
            self._is_read_only = _code(error) == sqlite3.SQLITE_READONLY
            raise _storage_error(error, self.path) from error

    def _open_again(self) -> None:
        """SQLite takes a file that it cannot open for writing at that moment for one that can only be read, and stays
        at that: the next transaction gets a connection that asks again."""
        self._is_read_only = False
        if self.path is None:
            return
        with contextlib.suppress(sqlite3.Error):
            fresh = self._open()
            self._connection.close()
            self._connection = fresh

    def _recover(self) -> None:
        """Puts a fresh file in the place of a damaged one; the caller's operation still fails."""
        self._connection.close()
        self._connection = self._open_fresh()
        self._depth = 0
        self._begin_epoch()

    def _open_or_replace(self, must_salvage: bool) -> sqlite3.Connection:
        try:
            if not must_salvage:
                return self._open()
        except UnicodeDecodeError:
            pass
        except sqlite3.Error as error:
            if self.path is None or not _is_damage_at_open(error, self.path):
                raise _storage_error(error, self.path) from error
        return self._open_fresh()

    def _open_fresh(self) -> sqlite3.Connection:
        """A new database with what can be salvaged of the damaged one, which goes to the quarantine."""
        self.recovered_total += 1
        try:
            if self.path is None:
                return self._open()
            damaged = self.path.with_name(f"{self.path.name}{_DAMAGED_SUFFIX}")
            for suffix in _SQLITE_SUFFIXES:
                with contextlib.suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + suffix).replace(f"{damaged}{suffix}")
            connection = self._open()
            self.salvaged = salvage(damaged, connection)
            self._put_away(damaged)
            return connection
        except sqlite3.Error as error:
            raise _storage_error(error, self.path) from error
        except OSError as error:
            raise StorageError(f"cannot replace the damaged {self.path}: {error.strerror}") from error

    def _put_away(self, damaged: Path) -> None:
        for suffix in reversed(_SQLITE_SUFFIXES):
            part = Path(f"{damaged}{suffix}")
            if suffix and part.exists():
                part.unlink()
            elif part.exists():
                self.quarantine.take(part, f"damaged database; salvaged: {self.salvaged}")

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connected(alone=False)
        except sqlite3.Error as error:
            if self.path is None or _code(error) not in _NO_ROOM:
                raise
            reason = str(error)
        # On a full disk there is no room for what several processes share; what is there can be read without it.
        connection = self._connected(alone=True)
        _log.warning("database_opened_alone", reason=reason)
        return connection

    def _connected(self, *, alone: bool) -> sqlite3.Connection:
        """A connection whose file is ours.

        Args:
            alone: no other process can look at the database while it is open.
        """
        if self.path is not None:
            _keep_private(self.path)
        connection = self._connect(
            MEMORY if self.path is None else self.path,
            timeout=5.0,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
        )
        connection.text_factory = lenient_text
        try:
            if alone:  # first: the next statement looks into the file
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            page_bytes = _MEMORY_PAGE_BYTES if self.path is None else PAGE_BYTES
            connection.execute(f"PRAGMA page_size = {page_bytes}")
            connection.execute(f"PRAGMA max_page_count = {max(64, self._max_bytes // page_bytes)}")
            if self.path is not None:
                connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
                connection.execute("PRAGMA secure_delete = ON")
                connection.execute("PRAGMA synchronous = FULL")
            self._durable = True
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        if not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            connection.execute("BEGIN IMMEDIATE")
            create(connection)
            connection.execute("COMMIT")
        version = version_of(connection)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise StorageError(
                f"{self.path} has format {version}, this agent reads up to {FORMAT_VERSION}",
                hint="update the agent, or move the file away to start with an empty one",
            )
        if version != FORMAT_VERSION or not is_ours(connection):
            raise _DamagedError("the schema is not ours")

    def _settle_epoch(self) -> None:
        """The epoch of this database; a new one if it is fresh, damaged, or older than the last used."""
        epoch = self.fact("epoch")
        last = self._last_epoch()
        if not isinstance(epoch, int) or not 0 < epoch < _MAX_EPOCH or epoch < last:
            self._begin_epoch()
            return
        self._epoch = epoch
        if epoch != last:
            self._keep_epoch(epoch)

    def _begin_epoch(self) -> None:
        epoch = max(int(self._clock.now()), self._last_epoch() + 1, self._epoch + 1)
        self._keep_epoch(epoch)
        self.set_fact("epoch", epoch)
        self.set_fact("reserved_seq", 0)
        self._epoch = epoch

    def _last_epoch(self) -> int:
        """The newest epoch used here, from a file beside the database that survives it."""
        if self.path is None:
            return self._epoch
        try:
            text = self.path.with_name(_EPOCH_NAME).read_text(encoding="ascii")[:20].strip()
        except (OSError, UnicodeDecodeError):
            return 0
        return int(text) if text.isdecimal() and int(text) < _MAX_EPOCH else 0

    def _keep_epoch(self, epoch: int) -> None:
        if self.path is not None:
            write_durably(self.path.with_name(_EPOCH_NAME), f"{epoch}\n".encode("ascii"))


def open_database(
    folder: str | Path,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    clock: Clock | None = None,
    connect: Connect = sqlite3.connect,
    vault: Vault | None = None,
) -> Database:
    """Opens (or makes) `agent.db` in a device's state folder.

    Args:
        folder: the state folder, or `":memory:"` for a simulated device.
        max_bytes: cap of the file; above it, writes raise `StorageError` with `full=True`.
        clock: gives a fresh database its epoch, and keys their day.
        connect: makes SQLite's connections.
        vault: what rows are sealed with; None takes keys in files of the state folder, or, in memory, keys that
            end with this database (who opens one again gives it the vault that it had).

    Raises:
        StorageError: the folder cannot be written, the keys cannot be read now, or the file was made by a newer
            agent. A damaged file raises nothing: it is in `quarantine/`, and `recovered_total` of the fresh
            database is 1. Nor do keys that are lost: what they sealed is found unreadable row by row.
    """
    clock = clock or SystemClock()
    if str(folder) == MEMORY:
        vault = vault or open_vault(None, clock)
        return Database(None, Quarantine(None), vault, max_bytes=max_bytes, clock=clock, connect=connect)
    root = Path(folder)
    try:
        # One that is there stays as its operator made it.
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StorageError(f"cannot make the state folder {root}: {error.strerror}") from error
    foreign = put_foreign_away(root)
    _claim_folder(root)
    vault = vault or open_vault(root, clock)
    if vault.damage:
        _log.error("at_rest_keys_lost", reason=vault.damage)
    quarantine = Quarantine(root / FOLDER_NAME, vault=vault)
    quarantine.kept_total = foreign
    path = root / DATABASE_NAME
    is_damaged = _is_log_damaged(path, quarantine)
    seal_plain_database(path, vault)
    quarantine.seal_plain()
    return Database(
        path,
        quarantine,
        vault,
        max_bytes=max_bytes,
        clock=clock,
        connect=connect,
        must_salvage=is_damaged,
    )


def _is_log_damaged(database: Path, quarantine: Quarantine) -> bool:
    """Puts right what a crash left in the write-ahead log, before SQLite drops what is behind the first wrong bit.

    Returns:
        Whether rows may be damaged.

    Raises:
        StorageError: the log could not be put right, so it must not be opened.
    """
    log = database.with_name(f"{database.name}{LOG_SUFFIX}")
    try:
        outcome = mend_log(log)
    except OSError:
        return False  # SQLite meets it next and says it better
    if outcome != "whole":
        _log.error("write_ahead_log_damaged", outcome=outcome)
    if outcome == "foreign":
        quarantine.take(log, "no write-ahead log of ours: what was committed there is gone")
    return outcome == "damaged"


def _claim_folder(root: Path) -> None:
    """Says in `FORMAT` whose folder this is; a damaged file is written anew.

    Raises:
        StorageError: another program of ours keeps its state here.
    """
    path = root / _FORMAT_NAME
    try:
        found = path.read_text(encoding="utf-8", errors="replace")[:100].strip()
    except OSError:
        found = ""
    if found.startswith("shoal-") and found != _FORMAT:
        raise StorageError(
            f"{root} holds {found!r}, not {_FORMAT!r}", hint="give each program its own folder"
        )
    if found != _FORMAT:
        write_durably(path, f"{_FORMAT}\n".encode("ascii"))


def _keep_private(path: Path) -> None:
    """Windows and updates are their owner's alone; SQLite gives the files beside it the same mode."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
    except OSError:
        return  # whatever it is, SQLite meets it next and says it better


def _fact_digest(name: str, value: object) -> bytes:
    """Over name, type and value; bytes (a codec's leftovers can be megabytes) go in as they are."""
    state = hashlib.sha256(f"{name}\0{type(value).__name__}\0".encode())
    state.update(value if isinstance(value, bytes) else repr(value).encode())
    return state.digest()


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code, or 0 for an error of the Python layer."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_damage_at_open(error: sqlite3.Error, path: Path) -> bool:
    """A damaged header can also read as an unknown format or as write protection."""
    code = _code(error)
    is_header = code == sqlite3.SQLITE_ERROR or (code == sqlite3.SQLITE_READONLY and os.access(path, os.W_OK))
    return code in _DAMAGED or is_header


def _storage_error(error: sqlite3.Error, path: Path | None) -> StorageError:
    code = _code(error)
    hints = {
        sqlite3.SQLITE_FULL: "free space on the disk, or raise the database's cap",
        sqlite3.SQLITE_BUSY: "another process holds the database: stop the second agent",
        sqlite3.SQLITE_READONLY: "the state folder must be writable by the agent's user",
        sqlite3.SQLITE_CANTOPEN: "the state folder must exist and be writable by the agent's user",
    }
    return StorageError(
        f"database {path or MEMORY}: {error}",
        hint=hints.get(code, ""),
        full=code == sqlite3.SQLITE_FULL,
        damaged=code in _DAMAGED,
    )
