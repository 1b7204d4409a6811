"""The database: schema and migrations agree, transactions are whole, a superseded writer is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from cloud_server.db import schema
from cloud_server.db.engine import Database, open_database
from wire.errors import ConfigurationError, StorageError
from wire.replay import Window


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(f"sqlite:///{tmp_path}/cloud.db")
    opened.migrate()
    yield opened
    opened.close()


def _columns(connection: sa.Connection) -> dict[str, list[tuple[str, str, bool]]]:
    inspector = sa.inspect(connection)
    tables = sorted(set(inspector.get_table_names()) - {"alembic_version"})
    return {
        table: [(c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(table)]
        for table in tables
    }


def test_schema_equals_what_the_migrations_make(database: Database) -> None:
    fresh = sa.create_engine("sqlite://")
    schema.metadata.create_all(fresh)
    with database.read() as migrated, fresh.connect() as created:
        context = MigrationContext.configure(migrated, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []
        assert _columns(migrated) == _columns(created)
    fresh.dispose()


def test_migrate_twice_changes_nothing(database: Database) -> None:
    database.migrate()
    with database.read() as connection:
        assert connection.execute(sa.select(schema.meta)).all() == [(1, schema.FORMAT, 1, 1, 0, 0, 0)]


def test_head_is_the_newest_migration(database: Database) -> None:
    folder = Path(schema.__file__).with_name("migrations")
    config = Config()
    config.set_main_option("script_location", str(folder))
    assert ScriptDirectory.from_config(config).get_heads() == [schema.HEAD]


def test_migrate_of_a_newer_database_is_refused(database: Database) -> None:
    with database.transaction() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StorageError, match="cannot be brought") as caught:
        database.migrate()
    assert "newer version" in caught.value.hint


def test_transaction_that_raises_leaves_nothing(database: Database) -> None:
    def fail_late() -> None:
        row = {"seq": 1, "prev": "", "hash": "a", "at": 0.0, "kind": "x", "body": "{}"}
        with database.transaction() as connection:
            connection.execute(sa.insert(schema.audit).values(row))
            raise KeyError

    with pytest.raises(KeyError):
        fail_late()
    with database.read() as connection:
        assert connection.execute(sa.select(schema.audit)).all() == []


def test_transaction_that_breaks_a_constraint_is_a_conflict(database: Database) -> None:
    window = {"device": "ghost", "type": "up", "epoch": 0, "highest": 0, "bitmap": 0}
    with pytest.raises(StorageError) as caught, database.transaction() as connection:
        connection.execute(sa.insert(schema.windows).values(window))
    assert caught.value.facts["is_conflict"]


def test_transaction_inside_a_transaction_is_refused(database: Database) -> None:
    with database.transaction(), pytest.raises(RuntimeError, match="inside another"), database.read():
        pass


def test_transactions_of_many_threads_lose_no_write(database: Database) -> None:
    def add() -> None:
        for _ in range(20):
            with database.transaction() as connection:
                value = connection.execute(sa.select(schema.meta.c.incarnation)).scalar_one()
                connection.execute(sa.update(schema.meta).values(incarnation=value + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert connection.execute(sa.select(schema.meta.c.incarnation)).scalar_one() == 81


def test_transaction_of_a_superseded_writer_is_refused(database: Database) -> None:
    first = database.claim_writer()
    with database.transaction(fence=first) as connection:
        connection.execute(sa.update(schema.meta).values(incarnation=7))
    second = database.claim_writer()
    assert second == first + 1
    with pytest.raises(StorageError, match="taken over"), database.transaction(fence=first) as connection:
        connection.execute(sa.update(schema.meta).values(incarnation=8))
    with database.read() as connection:
        assert connection.execute(sa.select(schema.meta.c.incarnation)).scalar_one() == 7


def test_sqlite_file_is_opened_durable(database: Database) -> None:
    with database.read() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_window_of_any_bitmap_comes_back(database: Database) -> None:
    device = {
        "device": "d1",
        "node_id": 2**63 - 1,
        "pseudonym": "p",
        "status": "approved",
        "update_key": "k",
        "certificate_serial": "1",
        "certificate_not_after": 1.0,
        "enrolled_at": 1.0,
        "max_examples": 1,
        "ring": "stable",
    }
    full = Window(epoch=2**63 - 1, highest=2**63 - 1, bitmap=2**64 - 1)
    with database.transaction() as connection:
        connection.execute(sa.insert(schema.devices).values(device))
        row = {"epoch": full.epoch, "highest": full.highest, "bitmap": full.bitmap}
        connection.execute(sa.insert(schema.windows).values(device="d1", type="up", **row))
    with database.read() as connection:
        columns = (schema.windows.c.epoch, schema.windows.c.highest, schema.windows.c.bitmap)
        assert Window(*connection.execute(sa.select(*columns)).one()) == full


def test_memory_database_is_one_for_all_threads() -> None:
    database = open_database("sqlite://")
    database.migrate()
    seen: list[int] = []

    def look() -> None:
        with database.read() as connection:
            seen.append(connection.execute(sa.select(schema.meta.c.incarnation)).scalar_one())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    database.close()
    assert seen == [1]


@pytest.mark.parametrize("in_memory", [False, True])
def test_peek_sees_what_is_committed_and_nothing_else(database: Database, in_memory: bool) -> None:
    if in_memory:
        database = open_database("sqlite://")
        database.migrate()
    query = "SELECT incarnation FROM meta"
    seen: list[int] = []
    with database.transaction() as connection:
        connection.execute(sa.update(schema.meta).values(incarnation=5))
        thread = threading.Thread(target=lambda: seen.append(database.peek(query)))
        thread.start()
        if not in_memory:  # in memory there is one connection, so the question waits for the transaction
            thread.join()
            assert seen == [1]
    thread.join()
    assert database.peek(query) == 5
    assert seen == ([5] if in_memory else [1])
    with pytest.raises(StorageError):
        database.peek("SELECT nothing FROM nowhere")
    database.close()


@pytest.mark.parametrize("url", ["", "no url", "nosuch://host/name", "sqlite+nosuch:///x"])
def test_open_database_with_a_bad_url_says_how_to_write_one(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_database(url)
    assert "sqlite:////" in caught.value.hint


def test_open_database_in_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        open_database(f"sqlite:///{tmp_path}/missing/cloud.db")


def test_open_database_of_a_file_that_is_no_database_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "cloud.db"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    with pytest.raises(StorageError):
        open_database(f"sqlite:///{path}")
