"""A stock Flower ServerApp drives real agents, and is killed with its aggregator: nothing in it knows of Shoal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from cloud_server.db.grid_steps import load_steps
from cloud_server.db.rounds import load_head, load_rounds, load_updates
from cloud_server.settings import BrokerSettings, CloudSettings, ListenSettings, RunSettings, TrainSettings
from edge_agent.settings import EdgeSettings, InferenceSettings, NetworkSettings
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud, free_port
from models.bundle import Bundle
from models.data import smartwatch
from process.options import render_toml
from tests.fleet.waiting import wait_for

DEVICES = ("person-05-left", "person-06-left")
RUN = "stock"
FLOWERS_LOOP = """
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from models.zoo import load

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    arrays = ArrayRecord(load("watch_cnn1d").make_model().state_dict())
    strategy = FedAvg(min_available_nodes=2, min_train_nodes=2, min_evaluate_nodes=2)
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=int(context.run_config["rounds"]))
"""
OWN_LOOP = """
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from models.zoo import load

app = ServerApp()


def gather(grid, record, kind):
    nodes = sorted(grid.get_node_ids())
    waiting = set(grid.push_messages(Message(RecordDict({"m": record}), node, kind) for node in nodes))
    replies = {}
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            replies[reply.metadata.src_node_id] = reply.content
        time.sleep(0.05)
    return [replies[node] for node in sorted(replies)]


@app.main()
def main(grid: Grid, context: Context) -> None:
    record = ArrayRecord(load("watch_cnn1d").make_model().state_dict())
    for _ in range(int(context.run_config["rounds"])):
        replies = [content["arrays"] for content in gather(grid, record, "train")]
        record = ArrayRecord(
            {name: Array(np.median([reply[name].numpy() for reply in replies], axis=0)) for name in record}
        )
        gather(grid, record, "evaluate")
"""


def settings() -> CloudSettings:
    return CloudSettings(
        fleet="stock",
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=BrokerSettings(kind="embedded", port=free_port()),
        run=RunSettings(
            name=RUN,
            seed=3,
            quorum=len(DEVICES),
            serverapp="my_server_app:app",
            parameters={"rounds": 2},
            paused=True,
            deadline_seconds=90.0,
            evaluate_seconds=90.0,
        ),
        train=TrainSettings(epochs=1, batch_size=16, learning_rate=0.02),
    )


def steps(cloud: LocalCloud) -> int:
    with cloud.deployment.database.read() as connection:
        return len(load_steps(connection, RUN))


def play(
    folder: Path, app: str, bundle: Bundle, kills: Sequence[int]
) -> tuple[bytes | None, dict[str, list[int]]]:
    """The whole app, killed with its aggregator whenever its record has so many steps; the head, and how many replies
    each of its exchanges had."""
    federation = smartwatch.federation()
    folder.mkdir()
    (folder / "my_server_app.py").write_text(app)
    agent_settings = folder / "agent.toml"
    agent_settings.write_text(
        render_toml(
            EdgeSettings(
                inference=InferenceSettings(variant="int8"), network=NetworkSettings(receipt_seconds=2.0)
            )
        )
    )
    with ExitStack() as stack:
        cloud = stack.enter_context(LocalCloud(folder / "cloud", settings(), federation, started_in=folder))
        cloud.start()
        agents = []
        for device in DEVICES:
            split, token = federation.devices[device], cloud.token(device)
            agent = LocalAgent(device, folder / device, agent_settings, token, split, rate_hz=1.0)
            stack.callback(agent.stop)
            agents.append(agent)
        cloud.import_model(bundle)
        wait_for(lambda: cloud.has_run and all(agent.is_taught for agent in agents), "agents")
        cloud.set_paused(False)
        for length in kills:
            wait_for(lambda length=length: steps(cloud) >= length, f"step {length} of the app")  # type: ignore[misc]
            cloud.kill()
            cloud.start()
        wait_for(lambda: cloud.is_finished, "the end of the app")
        with cloud.deployment.database.read() as connection:
            rounds = load_rounds(connection, RUN)
            replies = {
                kind: [len(load_updates(connection, RUN, row.number, kind, "folded")) for row in rounds]
                for kind in ("train", "evaluate")
            }
            assert load_steps(connection, RUN) == []
            return load_head(connection, RUN), replies


@pytest.mark.slow
@pytest.mark.parametrize(("app", "kills"), [(FLOWERS_LOOP, [3, 4, 7, 11]), (OWN_LOOP, [1, 4, 9])])
def test_app_that_is_killed_with_its_aggregator_gives_the_same_model(
    app: str, kills: list[int], tmp_path: Path, watch_bundle: Bundle
) -> None:
    undisturbed = play(tmp_path / "undisturbed", app, watch_bundle, [])
    killed = play(tmp_path / "killed", app, watch_bundle, kills)
    # Each exchange of the app is a round of ours: train, evaluate, train, evaluate.
    assert undisturbed[1] == {"train": [2, 0, 2, 0], "evaluate": [0, 2, 0, 2]}
    assert undisturbed[0] is not None
    assert killed == undisturbed
