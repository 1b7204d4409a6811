"""Real processes: a masked round is folded once, whole, also when the aggregator is killed in the middle of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from cloud_server.db.rounds import load_body, load_updates
from cloud_server.settings import SecureSettings
from edge_agent.settings import EdgeSettings, InferenceSettings, NetworkSettings, TrainingSettings
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud
from models.bundle import Bundle
from models.data import smartwatch
from process.options import render_toml
from tests.fleet.masked_fleet import DEVICES, settings
from tests.fleet.waiting import wait_for
from wire.messages import Update, decode_body

RUN = "masked"


@pytest.mark.slow
def test_masked_round_survives_an_aggregator_that_is_killed_in_it(
    tmp_path: Path, watch_bundle: Bundle
) -> None:
    federation = smartwatch.federation()
    secure = SecureSettings(policy="pairwise", dropout=0.3)
    agent_settings = tmp_path / "agent.toml"
    wanted = EdgeSettings(
        inference=InferenceSettings(variant="int8"),
        network=NetworkSettings(receipt_seconds=2.0),
        training=TrainingSettings(masked_only=True, min_masked=4),
    )
    agent_settings.write_text(render_toml(wanted))
    with ExitStack() as stack:
        cloud = stack.enter_context(
            LocalCloud(tmp_path / "cloud", settings(RUN, secure, quorum=3), federation)
        )
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
