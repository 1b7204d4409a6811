"""Two aggregators on one PostgreSQL database, real processes: one runs, one waits; the first is killed, or stopped and
woken later. Devices find the other by themselves, because their broker is the same."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloud_server.db.rounds import load_updates
from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    GateSettings,
    ListenSettings,
    MetricsSettings,
    RunSettings,
    StandbySettings,
    StorageSettings,
    TrainSettings,
)
from edge_agent.settings import EdgeSettings, InferenceSettings, NetworkSettings
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud, free_port
from models.bundle import Bundle
from process.options import render_toml
from tests.cloud.postgres_server import needs_postgres, postgres_server
from tests.fleet import thirds
from tests.fleet.waiting import LIMIT_SECONDS, wait_for
from wire.envelope import peek
from wire.errors import EnvelopeError, StorageError
from wire.transport import Packet, Received, TransportEvent
from wire.transport.broker import start_broker
from wire.transport.mqtt import MqttTransport

pytest.importorskip("psycopg", reason="needs psycopg: pip install 'shoal[postgres]'")
pytestmark = [*needs_postgres, pytest.mark.slow]
DEVICES = ("gate-1", "gate-2", "gate-3")
RUN = "pair"
MARK = "mark"


@dataclass
class Ear:
    """Hears all that the cloud says, and notes under which fencing token."""

    transport: MqttTransport
    epochs: list[int] = field(default_factory=list)
    marked: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        self.transport.start(self._deliver, filters=[("fl/1/#", 1), (MARK, 1)])

    def hear_all(self) -> None:
        """Returns when everything that the broker has by now was heard."""
        self.marked.clear()
        self.transport.publish(Packet(MARK, b"now"))
        assert self.marked.wait(LIMIT_SECONDS)

    def _deliver(self, event: TransportEvent) -> None:
        if not isinstance(event, Received):
            return
        if event.packet.topic == MARK:
            self.marked.set()
            return
        try:
            header = peek(event.packet.payload)
        except EnvelopeError:
            return  # chunks of a head are not signed one by one
        if header.direction == "down":
            self.epochs.append(header.epoch)


@dataclass
class Pair:
    """One fleet with two aggregators, of which the second waits."""

    first: LocalCloud
    second: LocalCloud
    agents: list[LocalAgent]
    ear: Ear

    def stored(self) -> int:
        """Replies in the books, of whatever round."""
        with self.second.deployment.database.read() as connection:
            return sum(
                len(load_updates(connection, RUN, number, "train", state))
                for number in (1, 2)
                for state in ("stored", "folded")
            )

    @property
    def fence(self) -> int:
        return self.second.deployment.database.current_fence()


def settings(folder: Path, database: str, broker: int) -> CloudSettings:
    return CloudSettings(
        fleet=RUN,
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=BrokerSettings(kind="external", port=broker),
        storage=StorageSettings(database=database, artefacts=f"file://{folder / 'shared'}"),
        metrics=MetricsSettings(listen=f"127.0.0.1:{free_port()}"),
        standby=StandbySettings(lease_seconds=10.0),
        run=RunSettings(
            name=RUN,
            seed=5,
            rounds=2,
            quorum=len(DEVICES),
            evaluate_every=0,
            paused=True,
            deadline_seconds=120.0,
        ),
        train=TrainSettings(epochs=2, batch_size=8, learning_rate=0.1),
        gate=GateSettings(max_operator_drop=1.0),
    )


def probe(cloud: LocalCloud) -> tuple[int, str]:
    """What `/readyz` says."""
    host, _, port = cloud.settings.metrics.listen.partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())["status"]
    except OSError:
        return 0, ""
    finally:
        connection.close()


@contextmanager
def pair(folder: Path, database: str, bundle: Bundle) -> Iterator[Pair]:
    """Both aggregators, and agents that are taught; the run is paused."""
    federation = thirds.make_federation(*DEVICES)
    place = folder / "agent.toml"
    edge = EdgeSettings(
        inference=InferenceSettings(variant="int8"), network=NetworkSettings(receipt_seconds=2.0)
    )
    place.write_text(render_toml(edge))
    with ExitStack() as stack:
        broker = stack.enter_context(start_broker("mosquitto", folder=folder / "broker"))
        ear = Ear(MqttTransport("ear", broker.host, broker.port))
        ear.start()
        stack.callback(ear.transport.stop)
        options = {"federation": federation, "arguments": ("--standby",)}
        first = stack.enter_context(
            LocalCloud(folder / "first", settings(folder, database, broker.port), **options)  # type: ignore[arg-type]
        )
        first.start()
        first.import_model(bundle)
        second = stack.enter_context(
            LocalCloud(
                folder / "second",
                settings(folder, database, broker.port),
                copied_from=first.root,
                **options,  # type: ignore[arg-type]
            )
        )
        second.launch()
        wait_for(lambda: probe(second) == (503, "standby"), "the standby")
        agents = []
        for device in DEVICES:
            split = federation.devices[device]
            agent = LocalAgent(device, folder / device, place, first.token(device), split, rate_hz=5.0)
            stack.callback(agent.stop)
            agents.append(agent)
        wait_for(lambda: first.has_run and all(agent.is_taught for agent in agents), "agents")
        wait_for(lambda: probe(first) == (200, "ready"), "the first aggregator")
        yield Pair(first, second, agents, ear)


def fail_over(fleet: Pair, how: signal.Signals) -> dict[str, float]:
    """Strikes the first aggregator in the middle of a round; seconds until the second one speaks, until the next reply
    is in the books, and until the run is over."""
    last = fleet.agents[-1].process_id
    os.kill(last, signal.SIGSTOP)
    try:
        fleet.first.set_paused(False)
        wait_for(lambda: fleet.stored() == len(DEVICES) - 1, "two receipts")
        before = fleet.fence
        os.kill(fleet.first.process_id, how)
        struck = time.monotonic()
    finally:
        os.kill(last, signal.SIGCONT)
    wait_for(lambda: fleet.fence > before, "the takeover")
    taken = time.monotonic() - struck
    wait_for(lambda: probe(fleet.second) == (200, "ready"), "the second aggregator")
    ready = time.monotonic() - struck
    wait_for(lambda: fleet.stored() >= len(DEVICES), "the next receipt")
    stored = time.monotonic() - struck
    wait_for(lambda: fleet.second.is_finished, "the end of the run")
    done = time.monotonic() - struck
    return {"taken over": taken, "ready": ready, "next receipt": stored, "second round done": done}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_standby_goes_on_with_the_round_and_the_first_one_says_nothing_more(
    how: signal.Signals, tmp_path: Path, thirds_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    with postgres_server() as database, pair(tmp_path, database, thirds_bundle) as fleet:
        before = fleet.fence
        seconds = fail_over(fleet, how)
        with capsys.disabled():
            print("\n" + how.name, {what: round(value, 1) for what, value in seconds.items()})
        assert fleet.stored() == 2 * len(DEVICES)
        assert [row.state for row in fleet.second.rounds()] == ["done", "done"]
        fleet.ear.hear_all()
        heard = len(fleet.ear.epochs)
        assert set(fleet.ear.epochs) == {before, before + 1}
        timestamp = fleet.second.deployment.repository.timestamp()
        if how is signal.SIGSTOP:
            os.kill(fleet.first.process_id, signal.SIGCONT)
            assert fleet.first.wait() == StorageError.exit_code
            fleet.ear.hear_all()
        assert fleet.fence == before + 1
        assert before not in fleet.ear.epochs[heard:]
        assert fleet.second.deployment.repository.timestamp() == timestamp
        assert not any(agent.errors for agent in fleet.agents)
