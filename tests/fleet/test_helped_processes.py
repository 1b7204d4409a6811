"""Real processes of three parties: devices, an aggregator that is killed in mid-round, and a helper of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cloud_server.cli import main
from cloud_server.db.rounds import load_body, load_updates
from cloud_server.helper.folder import HelperFolder
from cloud_server.settings import SecureSettings
from edge_agent.settings import EdgeSettings, InferenceSettings, NetworkSettings, TrainingSettings
from edge_agent.vitals.status import read_status
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud, free_port
from models.bundle import Bundle
from models.data import smartwatch
from process.options import render_toml
from tests.fleet.masked_fleet import DEVICES, settings
from tests.fleet.waiting import wait_for
from wire.messages import Update, decode_body

TENANT, RUN = "shoal", "helped"


class HelperProcess:
    """A running `shoal-cloud helper run`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log_file = folder, folder.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = "import sys; from cloud_server.cli import main; sys.exit(main())"
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", command, "helper", "run", "--state", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        wait_for(lambda: "helper_ready" in self.log_file.read_text(), "the helper")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


@pytest.fixture
def helper(tmp_path: Path) -> Iterator[HelperProcess]:
    process = HelperProcess(tmp_path / "helper")
    yield process
    process.kill()


@pytest.mark.slow
def test_helped_round_survives_an_aggregator_and_a_helper_that_are_killed_in_it(
    tmp_path: Path, watch_bundle: Bundle, helper: HelperProcess
) -> None:
    """The helper is away when it is asked, and the aggregator is killed while it waits; both come back."""
    port, federation = free_port(), smartwatch.federation()
    secure = SecureSettings(policy="two_server", helper_url=f"https://127.0.0.1:{port}", wait_seconds=90.0)
    made = ["--tenant", TENANT, "--fleet", RUN, "--port", str(port), "--min-devices", "4"]
    assert main(["helper", "init", "--state", str(helper.folder), *made]) == 0
    agent_settings = tmp_path / "agent.toml"
    agent_settings.write_text(
        render_toml(
            EdgeSettings(
                inference=InferenceSettings(variant="int8"),
                network=NetworkSettings(receipt_seconds=2.0),
                training=TrainingSettings(masked_only=True, min_masked=4),
            )
        )
    )
    with ExitStack() as stack:
        cloud = stack.enter_context(
            LocalCloud(tmp_path / "cloud", settings(RUN, secure, quorum=4), federation)
        )
        handed_out = helper.folder / "for-aggregator"
        shutil.copytree(handed_out, cloud.root / "helper")
        assert main(["helper", "trust", str(handed_out / "helper.json"), "--state", str(cloud.root)]) == 0
        cloud.import_model(watch_bundle)
        cloud.start()
        agents = []
        for device in DEVICES:
            token, split = cloud.token(device), federation.devices[device]
            agent = LocalAgent(device, tmp_path / device, agent_settings, token, split, rate_hz=1.0)
            stack.callback(agent.stop)
            agents.append(agent)
        wait_for(lambda: cloud.has_run and all(agent.is_taught for agent in agents), "agents")
        # What the people who run the devices tell those who run the helper.
        shown = {device: read_status(tmp_path / device) or {} for device in DEVICES}
        roster = tmp_path / "roster"
        roster.write_text("".join(f"{device} {row['update_key']}\n" for device, row in shown.items()))
        state = ["--state", str(helper.folder)]
        assert main(["helper", "device", "import", str(roster), *state]) == 0
        cloud.set_paused(False)
        wait_for(lambda: any(row.state == "asking" for row in cloud.rounds()), "the question")
        cloud.kill()
        helper.start()
        cloud.start()
        wait_for(lambda: cloud.is_finished, "the end of the run")
        rows = cloud.rounds()
        with cloud.deployment.database.read() as connection:
            folded = load_updates(connection, RUN, rows[-1].number, "train", "folded")
            bodies = [load_body(connection, row.update_id) for row in folded]
    assert rows[-1].head_sha256
    assert len(folded) == len(DEVICES)
    assert {row.codec for row in folded} == {"ring32"}
    assert all(not body or decode_body(body, Update).sealed_seed for body in bodies)
    helper.kill()
    store = HelperFolder(helper.folder).open_store()
    assert store.summary()[0] == 1
    store.close()
