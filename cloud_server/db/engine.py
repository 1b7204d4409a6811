"""Opens the database and gives transactions: SQLite by default, PostgreSQL by URL.

Laws of the file: a transaction that was entered either commits whole or leaves nothing; what commits is on
the disk (SQLite: WAL with `synchronous=FULL`); a write transaction takes SQLite's write lock at its
beginning, never in its middle (an upgrade from reader to writer fails with "database is locked" at once,
whatever the time-out says); errors of the driver leave as `StorageError`. Source:
https://sqlite.org/wal.html, docs/architecture.md (The aggregator).
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from cloud_server.db import schema
from wire.errors import ConfigurationError, StorageError

__all__ = ["Connection", "Database", "open_database"]

_MIGRATIONS = Path(__file__).with_name("migrations")
_BUSY_TIMEOUT_MS = 30_000
_READ_ONLY = "shoal_read_only"
# Made once: composing it takes longer than SQLite takes to execute it, and every reply's transaction asks.
_FENCE = sa.select(schema.fencing.c.token).with_for_update()
# Of a process that stopped inside a transaction (it hangs, its machine is gone): the server ends that, and lets go of
# what it locked, so that another one can take over. No transaction that writes computes for so long between two
# statements; one that reads may, and locks nothing.
_IDLE_IN_TRANSACTION = "SET LOCAL idle_in_transaction_session_timeout = '15s'"
_HINTS = {
    sqlite3.SQLITE_NOTADB: "it is no database: restore it from its backup",
    sqlite3.SQLITE_CORRUPT: "it is damaged: restore it from its backup",
    sqlite3.SQLITE_CANTOPEN: "it and its folder must exist, and be yours to write",
    sqlite3.SQLITE_READONLY: "it and its folder must be yours to write",
    sqlite3.SQLITE_FULL: "free space on the disk",
    sqlite3.SQLITE_BUSY: "another program holds it: close it there",
}


class Database:
    """One open database, for any number of threads; a transaction belongs to the thread that entered it.

    Attributes:
        on_commit: told how many seconds each commit took, from the committing thread.
        claimed: the fencing token that this process holds, once it has claimed one.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._place = _place(engine.url)
        self._is_sqlite = engine.dialect.name == "sqlite"
        # In memory there is one connection for all; in a file, waiting here is fair where SQLite's busy loop
        # is not.
        self._writer: AbstractContextManager[Any] = threading.Lock() if self._is_sqlite else nullcontext()
        self._is_shared = isinstance(engine.pool, StaticPool)
        self._local = threading.local()
        self.on_commit: Callable[[float], None] = lambda seconds: None
        self.claimed: int | None = None

    @property
    def is_server(self) -> bool:
        """Whether other machines can open it, too."""
        return not self._is_sqlite

    @contextmanager
    def transaction(self, *, fence: int | None = None) -> Iterator[Connection]:
        """A write transaction: commits at the end of the block, rolls back if the block raises.

        Args:
            fence: the token that `claim_writer` gave; the block runs only while no other process has claimed
                since.

        Raises:
            StorageError: (disk, us) the database refused; `is_conflict` tells a violated constraint from the
                rest.
        """
        with self._enter(self._writer):
            connection: Connection
            with self._translated(), self._engine.begin() as connection:
                if self.is_server:
                    connection.exec_driver_sql(_IDLE_IN_TRANSACTION)
                if fence is not None:
                    _check_fence(connection, fence)
                yield connection
                ended = time.perf_counter()
            self.on_commit(time.perf_counter() - ended)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A read transaction: one consistent view; does not wait for writers.

        Raises:
            StorageError: (disk, us) the database refused.
        """
        lock = self._writer if self._is_shared else nullcontext()
        with self._enter(lock), self._translated(), self._engine.connect() as raw:
            connection = raw.execution_options(**{_READ_ONLY: True})
            with connection.begin():
                yield connection

    def peek(self, statement: str) -> Any:
        """The first value of one SELECT, as committed now: ten times cheaper than `read`, for every message.

        Raises:
            StorageError: (disk, us) the database refused.
        """
        if not self._is_sqlite:
            with self.read() as connection:
                return connection.exec_driver_sql(statement).scalar_one()
        lock = self._writer if self._is_shared else nullcontext()
        with self._enter(lock), self._translated():
            borrowed = self._engine.raw_connection()
            try:
                raw: Any = borrowed.driver_connection
                return raw.execute(statement).fetchone()[0]
            finally:
                borrowed.close()

    def server_now(self) -> float | None:
        """Unix seconds by the database server's own clock; None of a database that has none.

        Raises:
            StorageError: (disk, us) the database refused.
        """
        return float(self.peek("SELECT extract(epoch FROM clock_timestamp())")) if self.is_server else None

    def snapshot(self, path: Path) -> None:
        """Writes the database as it is now into a new file, while others go on writing to it.

        Raises:
            ConfigurationError: (operator) it is no SQLite database.
            StorageError: (disk) it cannot be read, or the file not be written.
        """
        if not self._is_sqlite:
            raise ConfigurationError(
                f"{self._place} is not copied by this command",
                hint="copy it with its own tools (pg_dump), and back up the rest with a database that is SQLite",
            )
        lock = self._writer if self._is_shared else nullcontext()
        with self._enter(lock), self._translated():
            borrowed = self._engine.raw_connection()
            try:
                raw: Any = borrowed.driver_connection
                copy = sqlite3.connect(path)
                try:
                    # All pages in one step: a step between others would begin anew with every write of theirs.
                    raw.backup(copy)
                finally:
                    copy.close()
            finally:
                borrowed.close()

    def migrate(self) -> None:
        """Brings the schema to this version; creates it where there is none. Safe to call at every start.

        Raises:
            StorageError: (operator) the database was written by a newer version, or is not ours.
        """
        if self._is_current():
            return
        from alembic import command  # loading it takes longer than most commands that list something
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        with self._enter(self._writer), self._translated(), self._engine.begin() as connection:
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise StorageError(
                    f"the database cannot be brought to this version: {error}",
                    hint="it was written by a newer version of Shoal: install that one",
                    is_conflict=False,
                ) from error

    def _is_current(self) -> bool:
        with self.read() as connection:
            inspector = sa.inspect(connection)
            if not inspector.has_table("alembic_version"):
                self._refuse_foreign(inspector.get_table_names())
                return False
            versions = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all()
        return list(versions) == [schema.HEAD]

    def _refuse_foreign(self, tables: list[str]) -> None:
        """A file of somebody else's tables is not filled with ours (a PostgreSQL database may be shared)."""
        if self._is_sqlite and tables:
            raise StorageError(
                f"{self._place} holds {tables[0]!r} and no tables of Shoal's",
                hint="name another database, or restore this one from its backup",
                is_conflict=False,
            )

    def _translated(self) -> AbstractContextManager[None]:
        return _translated(self._place)

    def claim_writer(self) -> int:
        """Raises the fencing token and returns it: who claimed before can no longer commit with theirs. The lease of
        that one ends with it; nobody holds one until somebody renews it (`db/lease.py`)."""
        with self.transaction() as connection:
            values = {"token": schema.fencing.c.token + 1, "beat": 0, "lease_seconds": 0.0}
            connection.execute(sa.update(schema.fencing).values(**values))
            token = connection.execute(sa.select(schema.fencing.c.token)).scalar_one()
        self.claimed = int(token)
        return self.claimed

    def check_claim(self) -> None:
        """Looks whether this process is still the one that writes; cheap enough for every turn of a loop.

        What is not a transaction (a signature, a message) asks here before it is made. Nothing happens for a process
        that claimed nothing (a command).

        Raises:
            StorageError: (us) another process has claimed since; or the database refused.
        """
        if self.claimed is None:
            return
        current = int(self.peek("SELECT token FROM fencing"))
        if current != self.claimed:
            raise _taken_over(self.claimed, current)

    def current_fence(self) -> int:
        """The fencing token of whoever claimed last."""
        with self.read() as connection:
            return int(connection.execute(sa.select(schema.fencing.c.token)).scalar_one())

    def shorten_log(self) -> None:
        """Empties SQLite's write-ahead log into the database, if nobody reads; PostgreSQL looks after its own."""
        if self._is_sqlite:
            self.peek("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Closes every connection. Safe to call twice."""
        self._engine.dispose()

    @contextmanager
    def _enter(self, lock: AbstractContextManager[Any]) -> Iterator[None]:
        """Takes `lock`; a transaction inside another would wait for itself for ever, so it is an error."""
        if getattr(self._local, "is_inside", False):
            raise RuntimeError("a transaction was begun inside another: pass the connection on instead")
        with lock:
            self._local.is_inside = True
            try:
                yield
            finally:
                self._local.is_inside = False


def open_database(url: str, *, factory: Callable[..., sqlite3.Connection] | None = None) -> Database:
    """Opens (and for SQLite creates) the database of a URL; `sqlite://` alone is one in memory.

    Args:
        factory: makes SQLite's connections; a simulator's can be cut in the middle of a commit.

    Raises:
        ConfigurationError: (operator) not a URL, or a driver that is not installed.
        StorageError: (disk) the folder is missing or not writable.
    """
    options: dict[str, Any] = {"json_serializer": _dump_json, "hide_parameters": True}
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            options["connect_args"] = {"check_same_thread": False, "timeout": _BUSY_TIMEOUT_MS / 1000}
            if factory is not None:
                options["connect_args"]["factory"] = factory
            if parsed.database in (None, "", ":memory:"):
                options["poolclass"] = StaticPool
        else:
            options["pool_pre_ping"] = True
        engine = sa.create_engine(parsed, **options)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigurationError(
            "the database URL cannot be used",
            hint="use sqlite:////absolute/path/cloud.db or postgresql+psycopg://user@host/name",
        ) from error
    if parsed.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    try:
        with _translated(_place(parsed)), engine.connect():
            pass
    except StorageError:
        engine.dispose()
        raise
    return Database(engine)


def _place(url: sa.URL) -> str:
    """How an error calls the database; never with its password."""
    if url.get_backend_name() == "sqlite":
        return f"the database {url.database or 'in memory'}"
    return f"the database {url.render_as_string(hide_password=True)}"


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own BEGIN is deferred and late; with autocommit on, `_begin_sqlite` is the only one.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={_BUSY_TIMEOUT_MS}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    is_read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")


def _dump_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _check_fence(connection: Connection, fence: int) -> None:
    # FOR UPDATE: on PostgreSQL a newer claim must wait until this transaction is over (SQLite has one writer
    # anyway).
    current = connection.execute(_FENCE).scalar_one()
    if current != fence:
        raise _taken_over(fence, current)


def _taken_over(fence: int, current: int) -> StorageError:
    return StorageError(
        "another aggregator has taken over this database",
        hint="stop this one: only the newest may write",
        is_conflict=False,
        fence=fence,
        current=current,
    )


@contextmanager
def _translated(place: str) -> Iterator[None]:
    """The driver's errors as ours; what our own code raises inside passes as it is."""
    try:
        yield
    except IntegrityError as error:
        raise StorageError(f"{place} refused a row: {error.orig}", is_conflict=True) from error
    except (SQLAlchemyError, sqlite3.Error, UnicodeError) as error:
        # sqlite3.Error: raised past SQLAlchemy, by `peek` and while a connection is prepared.
        raise _failed(place, error) from error


def _failed(place: str, error: Exception) -> StorageError:
    """SQLAlchemy's own text ends in a link and may quote the statement: the driver's says enough."""
    cause = getattr(error, "orig", None) or error
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    text = str(cause).strip().partition("\n")[0]
    hint = _HINTS.get(code, "check that it runs, the disk, the rights and storage.database in settings.toml")
    return StorageError(f"{place} failed: {text}", hint=hint, is_conflict=False)
