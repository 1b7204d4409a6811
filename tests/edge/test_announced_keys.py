"""What an announcement says besides a release (keys, the oldest agent), and distrust at the broker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from edge_agent import actions as do
from edge_agent import events as on
from edge_agent.device_state import State
from edge_agent.state import step
from edge_agent.vitals.check import judge_version
from edge_agent.vitals.status import read_status
from process.version import VERSION
from tests.edge.lab import FLEET, TENANT, Lab
from tests.edge.test_state import GRAPHS, NOW, at, run, started
from wire.primitives import KemPrivateKey


def known(keys_version: int) -> State:
    """A device after its first check, which found keys of this version."""
    state, _ = step(State(), on.Started(1, GRAPHS, False, ()), NOW)
    return run(state, on.ReleaseInstalled(1, GRAPHS, keys_version), on.Connected())[0]


def test_announcement_of_other_keys_is_checked_at_once_and_of_the_known_ones_not() -> None:
    state, _ = run(known(7), on.AnnouncementArrived(1, 7))
    assert state.check_at > 1000
    state, _ = run(state, on.AnnouncementArrived(1, 8))
    assert 100.0 <= state.check_at <= 101.0
    state, actions = run(state, on.Tick(), now=at(1))
    assert do.StartJob("update") in actions
    state, _ = run(state, on.ReleaseInstalled(1, GRAPHS, 8), now=at(1))
    assert state.check_at > 1000


def test_announcement_during_a_check_that_found_older_keys_asks_for_another_one() -> None:
    state, _ = run(known(7), on.CheckWanted())
    state, _ = run(state, on.Tick(), now=at(1))
    assert state.phase == "updating"
    state, _ = run(state, on.AnnouncementArrived(1, 9), on.ReleaseInstalled(1, GRAPHS, 8), now=at(2))
    assert state.check_at <= 103.0


def test_announcement_that_says_nothing_of_keys_asks_for_nothing() -> None:
    state, _ = run(known(7), on.AnnouncementArrived(1))
    assert state.check_at > 1000
    state, _ = run(
        started(), on.AnnouncementArrived(1, 5)
    )  # and neither does one to a device that knows no number
    assert state.check_at > 1000


def test_distrust_at_the_broker_asks_for_one_check_until_there_is_a_connection_again() -> None:
    state, _ = run(started(), on.Disconnected())
    assert state.check_at > 1000
    state, _ = run(state, on.Disconnected(is_distrust=True))
    assert state.check_at <= 101.0
    state, actions = run(state, on.Tick(), now=at(1))
    assert do.StartJob("update") in actions
    failed, _ = run(state, on.JobFailed("update", b"", "no route"), now=at(1))
    state, _ = run(failed, on.Disconnected(is_distrust=True), now=at(1))
    assert state.check_at == failed.check_at  # the back-off of a check that failed
    state, _ = run(state, on.Connected(), on.Disconnected(is_distrust=True), now=at(2))
    assert state.check_at <= 103.0


def test_distrust_during_a_check_asks_for_another_one() -> None:
    """The check may have looked before the broker showed what it shows now."""
    state, _ = run(known(7), on.CheckWanted())
    state, _ = run(state, on.Tick(), now=at(1))
    assert state.phase == "updating"
    state, _ = run(state, on.Disconnected(is_distrust=True), on.ReleaseInstalled(1, GRAPHS, 7), now=at(2))
    assert state.check_at <= 103.0
    state, _ = run(state, on.Tick(), now=at(3))
    state, _ = run(state, on.ReleaseInstalled(1, GRAPHS, 7), now=at(4))
    assert state.check_at > 1000


def test_agent_learns_of_a_rotated_key_by_the_announcement(lab: Lab) -> None:
    """Not after six hours: updates are sealed to the new key from now on."""
    agent = lab.agent()
    lab.run(2)
    new = KemPrivateKey.generate()
    rotated = replace(lab.cloud.keys, kem=(new,))
    lab.cloud.repository.set_online_keys(rotated.online_json(tenant=TENANT, fleet=FLEET))
    say(lab, keys_version=lab.cloud.repository.keys_version())
    lab.run(5)
    assert agent.parts.speaker.kem_key_id == new.key_id


def test_agent_that_is_too_old_is_told_and_shows_it(
    lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agent = lab.agent(status_file=tmp_path / "status.json")
    lab.run(2)

    def shown(least: str) -> Mapping[str, Any]:
        say(lab, min_agent_version=least)
        lab.run(100)
        return read_status(tmp_path) or {}

    assert shown("9.0")["is_too_old"] is True
    found = judge_version(shown("9.0"))
    assert (found.level, found.detail) == ("warn", f"{VERSION} is older than 9.0")
    assert found.hint.startswith("update the agent")
    assert caplog.text.count("agent_too_old") == 1
    assert agent.infer(np.ones(12, np.float32)).release_version == 1
    assert shown(VERSION)["is_too_old"] is False
    assert judge_version(shown(VERSION)).level == "ok"


def say(lab: Lab, **facts: Any) -> None:
    """Announces the release that is there, and more."""
    announcement = structs.replace(lab.cloud.announcement(1), **facts)
    lab.cloud.say(announcement, device="*", topic=lab.cloud.topics.announcement("stable"), retain=True)
