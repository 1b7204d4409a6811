"""Real processes: SIGTERM in the middle of a round ends both sides well, and nothing is lost or doubled by it."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from cloud_server.db.rounds import UpdateRow, load_updates
from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    GateSettings,
    ListenSettings,
    RunSettings,
    TrainSettings,
)
from edge_agent.settings import (
    EdgeSettings,
    HealthSettings,
    InferenceSettings,
    NetworkSettings,
    TrainingSettings,
)
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud, free_port
from models.bundle import Bundle
from models.data import smartwatch
from process.options import render_toml
from tests.fleet.waiting import wait_for

QUICK = ("person-05-left", "person-05-right")
SLOW = "person-06-left"
RUN = "graceful"


def settings() -> CloudSettings:
    return CloudSettings(
        fleet="graceful",
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=BrokerSettings(kind="embedded", port=free_port()),
        run=RunSettings(
            name=RUN, seed=11, rounds=1, quorum=2, evaluate_every=0, paused=True, deadline_seconds=120.0
        ),
        train=TrainSettings(epochs=100, max_steps=100_000, batch_size=4, learning_rate=0.01),
        gate=GateSettings(max_operator_drop=1.0),
    )


def agent_settings(path: Path, max_steps: int) -> Path:
    """Of a device that does so many steps in a round, whatever it is asked for."""
    options = EdgeSettings(
        inference=InferenceSettings(variant="int8"),
        network=NetworkSettings(receipt_seconds=2.0),
        training=TrainingSettings(max_steps=max_steps, max_epochs=100),
        health=HealthSettings(check_seconds=1.0),
    )
    path.write_text(render_toml(options))
    return path


@pytest.mark.slow
def test_sigterm_in_the_middle_of_a_round_and_of_training_loses_and_doubles_nothing(
    tmp_path: Path, watch_bundle: Bundle
) -> None:
    federation = smartwatch.federation()
    short = agent_settings(tmp_path / "short.toml", 20)
    endless = agent_settings(tmp_path / "endless.toml", 100_000)
    with ExitStack() as stack:
        cloud = stack.enter_context(LocalCloud(tmp_path / "cloud", settings(), federation))
        cloud.import_model(watch_bundle)
        cloud.start()

        def agent(device: str, options: Path, token: str = "") -> LocalAgent:
            made = LocalAgent(
                device,
                tmp_path / device,
                options,
                token or cloud.token(device),
                federation.devices[device],
                rate_hz=1.0,
            )
            stack.callback(made.stop)
            return made

        agents = [agent(device, short) for device in QUICK]
        slow = agent(SLOW, endless)
        wait_for(lambda: cloud.has_run and all(each.is_taught for each in (*agents, slow)), "agents")
        cloud.set_paused(False)
        wait_for(lambda: len(stored(cloud, "stored")) == 2, "two receipts")
        wait_for(lambda: slow.status().get("phase") == "training", "training")
        assert cloud.stop() == 0, cloud.log_file.read_text()[-4000:]
        assert slow.stop() == 0, slow.log_file.read_text()[-4000:]
        assert "Traceback" not in slow.log_file.read_text() + cloud.log_file.read_text()
        assert slow.status()["status"] == "stopped"
        assert slow.status()["outbox"]["open"] == 0, "an update that was not finished is none"
        assert len(stored(cloud, "stored")) == 2, "what was acknowledged is there"

        cloud.start()
        again = agent(SLOW, short, "it is enrolled already")
        wait_for(lambda: cloud.is_finished, "the end of the run")
        folded = stored(cloud, "folded")
        assert {row.device for row in folded} >= set(QUICK)
        assert max(Counter(row.device for row in folded).values()) == 1
        assert stored(cloud, "stored") == []
        again.check()


def stored(cloud: LocalCloud, state: str) -> list[UpdateRow]:
    with cloud.deployment.database.read() as connection:
        return list(load_updates(connection, RUN, 1, "train", state))
