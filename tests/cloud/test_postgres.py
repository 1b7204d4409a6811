"""The database on a real PostgreSQL: the same schema, fence, chain and enrolment, under writers that race."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from cloud_server.db import schema
from cloud_server.db.audit import append_audit, verify_audit
from cloud_server.db.engine import Database, open_database
from tests.cloud.deployment import Newcomer, open_deployment
from wire.errors import EnrolmentError, StorageError

pytest.importorskip("psycopg", reason="needs psycopg: pip install 'shoal[postgres]'")
PG_CTL = shutil.which("pg_ctl") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")), "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PG_CTL, reason="needs PostgreSQL's pg_ctl")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL of our own; URL of its first database. PostgreSQL refuses to run as root."""
    folder = tmp_path_factory.mktemp("pg")
    as_user: list[str] = []
    if os.geteuid() == 0:
        as_user = ["runuser", "-u", "postgres", "--"]
        for place in (folder, *folder.parents[:2]):
            place.chmod(0o755)
        shutil.chown(folder, "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"

    def control(*words: str) -> None:
        command = [*as_user, PG_CTL, "-D", str(data), "-s", "-w", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    control("init", "-o", "-A trust -U postgres")
    control("start", "-o", options, "-l", str(folder / "log"))
    yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    control("stop", "-m", "immediate")


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
