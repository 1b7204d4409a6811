"""The database on a real PostgreSQL: the same schema, fence, chain, enrolment and rounds, under writers that race."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from cloud_server.cli import main
from cloud_server.db import schema
from cloud_server.db.audit import append_audit, verify_audit
from cloud_server.db.engine import Database, open_database
from cloud_server.deployment import Deployment, initialise
from cloud_server.settings import CloudSettings, StorageSettings
from tests.cloud.deployment import Newcomer, open_deployment
from tests.cloud.postgres_server import PG_CTL, needs_postgres, postgres_server
from tests.cloud.round_lab import Lab
from wire.errors import EnrolmentError, StorageError

pytest.importorskip("psycopg", reason="needs psycopg: pip install 'shoal[postgres]'")
pytestmark = needs_postgres


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture
def url(server: str) -> str:
    """The same, with nothing in it."""
    database = open_database(server)
    with database.transaction() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    database.close()
    return server


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = open_database(url)
    opened.migrate()
    yield opened
    opened.close()


def test_schema_equals_what_the_migrations_make(database: Database) -> None:
    database.migrate()
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_superseded_writer_is_refused(database: Database) -> None:
    first = database.claim_writer()
    database.claim_writer()
    with pytest.raises(StorageError, match="taken over"), database.transaction(fence=first):
        pass


def test_chain_stays_whole_under_writers_that_race(database: Database) -> None:
    def write() -> None:
        for number in range(15):
            with database.transaction() as connection:
                append_audit(connection, "test", 1.5, {"number": number})

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert verify_audit(connection) == 60


def test_window_and_json_come_back(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute(
            sa.insert(schema.models).values(
                graphs_sha256="ab", name="m", manifest=b"\0\1", checkpoint_sha256="cd", created=1.5
            )
        )
        config = {"strategy": "FedAvg", "shares": [0.1, 2]}
        connection.execute(
            sa.insert(schema.runs).values(
                run="r", created=1.0, graphs_sha256="ab", config=config, seed=2**63 - 1, status="active"
            )
        )
    with database.read() as connection:
        row = connection.execute(sa.select(schema.runs)).one()
    assert (row.config, row.seed) == (config, 2**63 - 1)


def test_one_token_lets_one_of_many_racing_devices_in(url: str, tmp_path: Path) -> None:
    with open_deployment(tmp_path, url) as deployment:
        token = deployment.mint()
        requests = [Newcomer(f"d{number}").request(token) for number in range(6)]
        outcomes: list[str] = []

        def enrol(number: int) -> None:
            try:
                deployment.enrolment.enrol(requests[number])
                outcomes.append("in")
            except EnrolmentError as error:
                outcomes.append(str(error.facts["code"]))

        threads = [threading.Thread(target=enrol, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["in", *["token_used"] * 5]
        assert len(deployment.registry.devices()) == 1


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam"])
def test_rounds_give_the_same_parameters_as_on_sqlite(url: str, strategy: str) -> None:
    expected = Lab(4, strategy=strategy).run().sha256
    lab = Lab(4, strategy=strategy, database=url)
    assert lab.run().sha256 == expected
    counted = Counter((row.kind, row.state) for row in lab.rows(schema.updates))
    assert counted == {("train", "folded"): 8, ("evaluate", "folded"): 8}
    lab.database.close()


def test_restart_before_every_turn_gives_the_same_parameters(url: str) -> None:
    expected = Lab(2, rounds=1).run().sha256
    lab = Lab(2, rounds=1, database=url)
    for _ in range(400):
        if lab.runner.is_finished:
            break
        lab.step()
        lab.restart()
    assert lab.runner.head.sha256 == expected
    lab.database.close()


def test_second_aggregator_takes_over_and_the_first_can_write_no_more(url: str) -> None:
    """Two processes' engines on one server, as two hosts would have them."""
    first, second = open_database(url), open_database(url)
    first.migrate()
    old = first.claim_writer()
    new = second.claim_writer()
    for _ in range(2):
        with pytest.raises(StorageError, match="taken over"), first.transaction(fence=old):
            pass
        with second.transaction(fence=new) as connection:
            append_audit(connection, "test", 1.5, {})
    first.close()
    second.close()


@pytest.mark.slow
def test_process_that_stopped_inside_of_a_transaction_keeps_nobody_from_taking_over(url: str) -> None:
    """As a machine that is gone, or a process that is stopped: nothing ends its connection."""
    first, second = open_database(url), open_database(url)
    first.migrate()
    old = first.claim_writer()

    def stop_inside() -> None:
        with first.transaction(fence=old) as connection:
            append_audit(connection, "test", 1.5, {})
            # Waits for the row that the first one has locked, until the server ends that one's transaction.
            assert second.claim_writer() == old + 1
            append_audit(connection, "test", 1.5, {})

    with pytest.raises(StorageError):
        stop_inside()
    with second.read() as connection:
        assert connection.execute(sa.select(schema.audit)).all() == []
    first.close()
    second.close()


def pg_tool(name: str, url: str, *words: str) -> None:
    """Runs one of PostgreSQL's own tools on the database."""
    address = url.replace("+psycopg", "")
    subprocess.run(
        [Path(PG_CTL).resolve().with_name(name), *words, address], check=True, stdout=subprocess.DEVNULL
    )


def test_database_that_came_back_from_a_dump_begins_another_life(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dump, then a copy of the folder; what the lost life gave out after that is not given out again."""
    folder, copy, dump = tmp_path / "state", tmp_path / "copy", tmp_path / "dump"
    with initialise(folder, CloudSettings(storage=StorageSettings(database=url))) as cloud:
        pg_tool("pg_dump", url, "--format=custom", f"--file={dump}")
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("offline"))
        lost = [cloud.database.claim_writer() for _ in range(20)]
    pg_tool("pg_restore", url, "--clean", str(dump), "--dbname")
    assert main(["restore", "--in-place", "--state", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["incarnation"] == 2
    with Deployment.open(copy) as restored:
        assert restored.database.claim_writer() > max(lost)
    assert main(["audit", "verify", "--state", str(copy)]) == 0


def test_server_that_is_away_is_one_clear_error(url: str) -> None:
    nowhere = url.replace(url.rpartition(":")[2], "9/postgres")
    with pytest.raises(StorageError) as caught:
        open_database(nowhere).migrate()
    assert caught.value.hint
    assert len(str(caught.value).splitlines()) == 1
