"""A PostgreSQL of our own, where it is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PG_CTL = shutil.which("pg_ctl") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")), "")
needs_postgres = [pytest.mark.skipif(not PG_CTL, reason="needs PostgreSQL's pg_ctl")]


@contextmanager
def postgres_server() -> Iterator[str]:
    """Runs a server in a folder of its own; gives the URL of its first database.

    PostgreSQL refuses to run as root, and pytest closes its folders to all but their owner at every start.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-pg-") as folder:
        as_user: list[str] = []
        if os.geteuid() == 0:
            as_user = ["runuser", "-u", "postgres", "--"]
            shutil.chown(folder, "postgres")
        with _running(Path(folder), as_user) as url:
            yield url


@contextmanager
def _running(folder: Path, as_user: list[str]) -> Iterator[str]:
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
    try:
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    finally:
        control("stop", "-m", "fast")
