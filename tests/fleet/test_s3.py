"""A fleet with its books in PostgreSQL and its artefacts in S3, as a larger one has them: real processes, a round, a
release, downloads that resume, a store that goes away and comes back.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    GateSettings,
    ListenSettings,
    RunSettings,
    StorageSettings,
    TrainSettings,
)
from edge_agent.enrolment import identity as identity_files
from edge_agent.release import tuf_client
from edge_agent.release.fetcher import HttpsFetcher
from edge_agent.settings import EdgeSettings, InferenceSettings
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud, free_port
from models.bundle import Bundle
from process.clock import SystemClock
from process.options import render_toml
from tests.cloud.postgres_server import needs_postgres, postgres_server
from tests.cloud.s3_server import BUCKET, S3Server
from tests.fleet import thirds
from tests.fleet.waiting import wait_for
from wire.errors import TransportError

pytest.importorskip("moto", reason="needs moto: pip install 'shoal[dev]'")
DEVICES = ("gate-1", "gate-2")
CUT_AFTER_BYTES = 8_000
"""Of some 36,000 that the download takes: there is something left to carry after three breaks."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    server.credentials.put_into(monkeypatch)
    yield server
    server.stop()


@pytest.fixture(
    params=[pytest.param("postgres", marks=needs_postgres), pytest.param("sqlite", marks=pytest.mark.slow)]
)
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of the database; empty for the one in the state folder."""
    if request.param == "sqlite":
        yield ""
        return
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'shoal[postgres]'")
    with postgres_server() as url:
        yield url


def settings(database: str) -> CloudSettings:
    return CloudSettings(
        fleet="s3",
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=BrokerSettings(kind="embedded", port=free_port()),
        storage=StorageSettings(database=database, artefacts=f"s3://{BUCKET}/fleet-a"),
        run=RunSettings(name="s3", seed=5, rounds=1, quorum=len(DEVICES), paused=True, deadline_seconds=60.0),
        train=TrainSettings(epochs=10, batch_size=8, learning_rate=0.1),
        gate=GateSettings(max_operator_drop=1.0),
    )


class BreakingLine:
    """Carries TCP to a port of this machine, and breaks each of its first connections in the middle."""

    def __init__(self, port: int, breaks: int) -> None:
        self._port = port
        self._left = breaks
        self.broken = 0
        self._counting = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._carriers: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for carrier in self._carriers:
            carrier.join()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            limit = CUT_AFTER_BYTES if self._left > 0 else None
            self._left -= 1
            carrier = threading.Thread(target=self._carry, args=(near, limit), daemon=True)
            carrier.start()
            self._carriers.append(carrier)

    def _carry(self, near: socket.socket, limit: int | None) -> None:
        with near, socket.create_connection(("127.0.0.1", self._port)) as far:
            up = threading.Thread(target=self._pump, args=(near, far, None), daemon=True)
            up.start()
            is_broken = self._pump(far, near, limit)
            # `+=` reads before it calls: the next connection may begin before this one's end is counted.
            with self._counting:
                self.broken += is_broken
            up.join()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, limit: int | None) -> bool:
        """Carries one way to its end, or to the limit; says whether it was that. Both ways end together."""
        carried, is_broken = 0, False
        with contextlib.suppress(OSError):
            while not is_broken and (data := source.recv(2048)):
                target.sendall(data)
                carried += len(data)
                is_broken = limit is not None and carried > limit
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return is_broken


def download(state: Path, folder: Path, cloud: LocalCloud, *, breaks: int) -> dict[str, bytes]:
    """All files of the present release, over a line that breaks."""
    line = BreakingLine(cloud.settings.listen.device_port, breaks)
    identity = replace(identity_files.load(state), url_api=f"https://127.0.0.1:{line.port}")
    fetcher = HttpsFetcher(identity, pause=lambda _seconds: None)
    try:
        info = tuf_client.check(folder, identity.tuf_root, fetcher, identity.ring, SystemClock())
        paths = tuf_client.download(info, held=lambda _graphs: frozenset())
        return {name: path.read_bytes() for name, path in paths.items()}
    finally:
        fetcher.close()
        line.close()
        assert line.broken == breaks


@contextlib.contextmanager
def fleet(folder: Path, database: str, bundle: Bundle) -> Iterator[tuple[LocalCloud, list[LocalAgent]]]:
    """An aggregator and its agents, which have the first release and their labelled windows; the run is paused."""
    federation = thirds.make_federation(*DEVICES)
    place = folder / "agent.toml"
    place.write_text(render_toml(EdgeSettings(inference=InferenceSettings(variant="int8"))))
    with ExitStack() as stack:
        cloud = stack.enter_context(LocalCloud(folder / "cloud", settings(database), federation))
        cloud.import_model(bundle)
        cloud.start()
        agents = []
        for device in DEVICES:
            split = federation.devices[device]
            agent = LocalAgent(device, folder / device, place, cloud.token(device), split, rate_hz=5.0)
            stack.callback(agent.stop)
            agents.append(agent)
        wait_for(lambda: cloud.has_run and all(agent.is_taught for agent in agents), "the first release")
        yield cloud, agents


def test_fleet_with_its_artefacts_in_s3_learns_releases_and_survives_its_absence(
    tmp_path: Path, server: S3Server, database: str, thirds_bundle: Bundle
) -> None:
    with fleet(tmp_path, database, thirds_bundle) as (cloud, agents):
        cloud.set_paused(False)
        wait_for(lambda: all(agent.release == 2 for agent in agents), "what the round made")
        assert not any(agent.errors for agent in agents)

        server.stop()
        try:
            with pytest.raises(TransportError):
                download(agents[0].state, tmp_path / "none", cloud, breaks=0)
            cloud.check()
        finally:
            server.start()
        files = download(agents[0].state, tmp_path / "staging", cloud, breaks=3)
    assert files["template.onnx"] == thirds_bundle.read("template.onnx")
    assert {key.split("/")[0] for key in server.stored()} == {"fleet-a"}
    assert {key.split("/")[1] for key in server.stored()} >= {"tuf", "blobs"}
    assert not (tmp_path / "cloud" / "artefacts").exists()
    assert (tmp_path / "cloud" / "cloud.db").exists() == (database == "")


@pytest.mark.slow
def test_store_that_goes_away_in_a_round_ends_the_service_and_the_next_one_finishes_the_round(
    tmp_path: Path, server: S3Server, thirds_bundle: Bundle
) -> None:
    with fleet(tmp_path, "", thirds_bundle) as (cloud, agents):
        server.stop()
        cloud.set_paused(False)
        try:
            wait_for(lambda: cloud.log_file.read_text().count("\nerror: ") == 1, "the end of the service")
        finally:
            server.start()
        cloud.stop()
        assert "error: the artefact store failed at blobs/" in cloud.log_file.read_text()
        cloud.start()
        wait_for(lambda: all(agent.release == 2 for agent in agents), "the release of that round")
        assert cloud.is_finished
        assert not any(agent.errors for agent in agents)
