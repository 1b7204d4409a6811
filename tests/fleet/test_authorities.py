"""A certificate authority that is replaced under a running fleet, with real processes: mosquitto, aggregator, agent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_agent.enrolment import identity as identity_files
from edge_agent.enrolment.enrol import enrol
from edge_agent.settings import EdgeSettings, InferenceSettings
from fleet.local_agent import LocalAgent
from fleet.local_cloud import LocalCloud
from models.bundle import Bundle
from process.clock import SystemClock
from process.options import render_toml
from tests.fleet import thirds
from tests.fleet.test_renewal import DEVICE, settings
from tests.fleet.waiting import wait_for
from tests.transport.conftest import needs_mosquitto
from wire.primitives import certificate_fingerprints

pytestmark = [*needs_mosquitto, pytest.mark.slow]


def keys(cloud: LocalCloud, *words: str) -> Any:
    """`shoal-cloud keys …` in a process of its own."""
    command = ["keys", *words, "--state", str(cloud.root), "--json"]
    code = f"import sys; from cloud_server.cli import main; sys.exit(main({command!r}))"
    ended = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, stdout=subprocess.PIPE)
    return json.loads(ended.stdout)


def test_fleet_follows_an_authority_that_takes_over_and_one_that_was_stolen(
    tmp_path: Path, thirds_bundle: Bundle
) -> None:
    """The agent is told by a signed announcement in the first case; in the second it finds the way back by itself."""
    federation = thirds.make_federation(DEVICE)
    place = tmp_path / "agent.toml"
    place.write_text(render_toml(EdgeSettings(inference=InferenceSettings(variant="int8"))))
    state = tmp_path / DEVICE
    with LocalCloud(tmp_path / "cloud", settings(), federation) as cloud:
        cloud.import_model(thirds_bundle)
        cloud.start()
        identity = enrol(cloud.token(DEVICE), state, clock=SystemClock())
        agent = LocalAgent(DEVICE, state, place, "", federation.devices[DEVICE], rate_hz=20.0)

        def trusted() -> set[str]:
            return {each.hex() for each in certificate_fingerprints(identity.ca_path.read_bytes())}

        def is_connected() -> bool:
            return agent.status().get("connected") is True

        try:
            wait_for(lambda: agent.answered > 0 and is_connected(), "the first release, and the broker")
            first = cloud.deployment.authority.fingerprint
            second = keys(cloud, "rotate", "ca")["key_id"]
            wait_for(lambda: trusted() == {first, second}, "the announcement of the second authority")
            wait_for(lambda: "broker_follows_authorities" in cloud.log_file.read_text(), "the broker")
            wait_for(is_connected, "the broker, which was started again")
            third = keys(cloud, "rotate", "ca", "--stolen")["key_id"]
            wait_for(lambda: trusted() == {third}, "the agent's way back")
            wait_for(is_connected, "the broker of the third authority")
            asked = agent.sent
            wait_for(lambda: agent.answered + agent.errors > asked, "answers after both")
            agent.check()
        finally:
            agent.stop()
        assert agent.errors == 0
        assert identity_files.load(state).certificate_pem != identity.certificate_pem
        assert "certificate_renewed" in agent.log_file.read_text()
