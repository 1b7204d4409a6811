"""Real processes: a masked round is folded once, whole, also when the aggregator is killed in the middle of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from cloud_server.db.rounds import load_body, load_updates
from cloud_server.settings import (
    BrokerSettings,
    CloudSettings,
    GateSettings,
    ListenSettings,
    RunSettings,
    SecureSettings,
    TrainSettings,
)
from edge_agent.settings import EdgeSettings, InferenceSettings, NetworkSettings, TrainingSettings
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud, free_port
from models.bundle import Bundle
from models.data import smartwatch
from process.options import render_toml
from tests.fleet.waiting import wait_for
from wire.messages import Update, decode_body

DEVICES = ("person-05-left", "person-05-right", "person-06-left", "person-06-right")
RUN = "masked"


def settings() -> CloudSettings:
    return CloudSettings(
        fleet="masked",
        listen=ListenSettings(public_port=free_port(), device_port=free_port()),
        broker=BrokerSettings(kind="embedded", port=free_port()),
        run=RunSettings(
            name=RUN,
            strategy="FedAvg",
            seed=11,
            rounds=1,
            quorum=3,
            evaluate_every=0,
            paused=True,
            deadline_seconds=90.0,
            max_holdout_drop=1.0,
        ),
        secure=SecureSettings(policy="pairwise", dropout=0.3),
        train=TrainSettings(epochs=1, batch_size=16, learning_rate=0.02),
        gate=GateSettings(max_operator_drop=1.0),
    )


@pytest.mark.slow
def test_masked_round_survives_an_aggregator_that_is_killed_in_it(
    tmp_path: Path, watch_bundle: Bundle
) -> None:
    federation = smartwatch.federation()
    agent_settings = tmp_path / "agent.toml"
    wanted = EdgeSettings(
        inference=InferenceSettings(variant="int8"),
        network=NetworkSettings(receipt_seconds=2.0),
        training=TrainingSettings(masked_only=True, min_masked=4),
    )
    agent_settings.write_text(render_toml(wanted))
    with ExitStack() as stack:
        cloud = stack.enter_context(LocalCloud(tmp_path / "cloud", settings(), federation))
        cloud.import_model(watch_bundle)
        cloud.start()
        agents = []
        for device in DEVICES:
            token, split = cloud.token(device), federation.devices[device]
            agent = LocalAgent(device, tmp_path / device, agent_settings, token, split, rate_hz=1.0)
            stack.callback(agent.stop)
            agents.append(agent)
        wait_for(lambda: cloud.has_run and all(agent.is_taught for agent in agents), "agents")
        cloud.set_paused(False)
        wait_for(lambda: any(row.state == "training" or row.head_sha256 for row in cloud.rounds()), "shares")
        cloud.kill()
        cloud.start()
        wait_for(lambda: cloud.is_finished, "the end of the run")
        rows = cloud.rounds()
        with cloud.deployment.database.read() as connection:
            folded = load_updates(connection, RUN, rows[-1].number, "train", "folded")
            bodies = [load_body(connection, row.update_id) for row in folded]
    assert rows[-1].head_sha256
    assert len(folded) >= 3
    assert {row.codec for row in folded} == {"ring32"}
    # The body goes with the commit; what was stored before was masked.
    assert all(not body or decode_body(body, Update).codec == "ring32" for body in bodies)
