"""Real processes: an aggregator that is killed between receipt and fold loses and doubles nothing."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

from cloud_server.db.rounds import load_head, load_updates
from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    GateSettings,
    ListenSettings,
    RunSettings,
    TrainSettings,
)
from edge_agent.settings import EdgeSettings, InferenceSettings, NetworkSettings
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud, free_port
from models.bundle import Bundle
from models.data import smartwatch
from process.options import render_toml
from tests.fleet.waiting import wait_for

DEVICES = ("person-05-left", "person-05-right", "person-06-left")
RUN = "restart"


def settings() -> CloudSettings:
    return CloudSettings(
        fleet="restart",
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=BrokerSettings(kind="embedded", port=free_port()),
        run=RunSettings(
            name=RUN,
            seed=11,
            rounds=1,
            quorum=len(DEVICES),
            evaluate_every=0,
            paused=True,
            deadline_seconds=90.0,
        ),
        train=TrainSettings(epochs=1, batch_size=16, learning_rate=0.02),
        gate=GateSettings(max_operator_drop=1.0),
    )


def stored(cloud: LocalCloud) -> int:
    with cloud.deployment.database.read() as connection:
        return len(load_updates(connection, RUN, 1, "train", "stored"))


def play(folder: Path, bundle: Bundle, *, kill: bool) -> tuple[bytes | None, int]:
    """One round of three agents; returns the head's hash and how many updates were folded."""
    federation = smartwatch.federation()
    agent_settings = folder / "agent.toml"
    folder.mkdir()
    agent_settings.write_text(
        render_toml(
            EdgeSettings(
                inference=InferenceSettings(variant="int8"), network=NetworkSettings(receipt_seconds=2.0)
            )
        )
    )
    with ExitStack() as stack:
        cloud = stack.enter_context(LocalCloud(folder / "cloud", settings(), federation))
        cloud.import_model(bundle)
        cloud.start()
        agents = []
        for device in DEVICES:
            agent = LocalAgent(
                device,
                folder / device,
                agent_settings,
                cloud.token(device),
                federation.devices[device],
                rate_hz=1.0,
            )
            stack.callback(agent.stop)
            agents.append(agent)
        wait_for(lambda: cloud.has_run and all(agent.is_taught for agent in agents), "agents")
        if kill:
            os.kill(agents[-1].process_id, signal.SIGSTOP)
            stack.callback(os.kill, agents[-1].process_id, signal.SIGCONT)
        cloud.set_paused(False)
        if kill:
            wait_for(lambda: stored(cloud) == len(DEVICES) - 1, "two receipts")
            cloud.kill()
            cloud.start()
            os.kill(agents[-1].process_id, signal.SIGCONT)
        wait_for(lambda: cloud.is_finished, "the end of the run")
        with cloud.deployment.database.read() as connection:
            folded = load_updates(connection, RUN, 1, "train", "folded")
            return load_head(connection, RUN), len(folded)


def test_aggregator_killed_between_receipt_and_fold_gives_the_same_parameters(
    tmp_path: Path, watch_bundle: Bundle
) -> None:
    undisturbed = play(tmp_path / "undisturbed", watch_bundle, kill=False)
    killed = play(tmp_path / "killed", watch_bundle, kill=True)
    assert undisturbed[0] is not None
    assert killed == undisturbed
    assert killed[1] == len(DEVICES)
