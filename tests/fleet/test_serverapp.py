"""A stock Flower ServerApp drives real agents: nothing in it knows of Shoal."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from cloud_server.db.rounds import load_rounds, load_updates
from cloud_server.settings import BrokerSettings, CloudSettings, ListenSettings, RunSettings, TrainSettings
from edge_agent.settings import EdgeSettings, InferenceSettings
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud, free_port
from models.bundle import Bundle
from models.data import smartwatch
from process.options import render_toml
from tests.fleet.waiting import wait_for

DEVICES = ("person-05-left", "person-06-left")
APP = """
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


def settings() -> CloudSettings:
    return CloudSettings(
        fleet="stock",
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=BrokerSettings(kind="embedded", port=free_port()),
        run=RunSettings(
            name="stock",
            seed=3,
            quorum=len(DEVICES),
            serverapp="my_server_app:app",
            parameters={"rounds": 2},
            paused=True,
            deadline_seconds=60.0,
            evaluate_seconds=60.0,
        ),
        train=TrainSettings(epochs=1, batch_size=16, learning_rate=0.02),
    )


@pytest.mark.slow
def test_stock_serverapp_trains_and_evaluates_real_agents(tmp_path: Path, watch_bundle: Bundle) -> None:
    federation = smartwatch.federation()
    (tmp_path / "my_server_app.py").write_text(APP)
    agent_settings = tmp_path / "agent.toml"
    agent_settings.write_text(render_toml(EdgeSettings(inference=InferenceSettings(variant="int8"))))
    with ExitStack() as stack:
        cloud = stack.enter_context(
            LocalCloud(tmp_path / "cloud", settings(), federation, started_in=tmp_path)
        )
        cloud.start()
        agents = []
        for device in DEVICES:
            split, token = federation.devices[device], cloud.token(device)
            agent = LocalAgent(device, tmp_path / device, agent_settings, token, split, rate_hz=1.0)
            stack.callback(agent.stop)
            agents.append(agent)
        cloud.import_model(watch_bundle)
        wait_for(lambda: cloud.has_run and all(agent.is_taught for agent in agents), "agents")
        cloud.set_paused(False)
        wait_for(lambda: cloud.is_finished, "the end of the app")
        with cloud.deployment.database.read() as connection:
            rounds = load_rounds(connection, "stock")
            replies = {
                kind: [len(load_updates(connection, "stock", row.number, kind, "folded")) for row in rounds]
                for kind in ("train", "evaluate")
            }
    # Each exchange of the app is a round of ours: train, evaluate, train, evaluate.
    assert replies == {"train": [2, 0, 2, 0], "evaluate": [0, 2, 0, 2]}
