"""A device whose identity cannot be read answers, says what is wrong and speaks to nobody; then it goes on."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent import Agent
from edge_agent.cli import main
from edge_agent.vitals.status import read_status
from models.bundle import Bundle
from process.pulse import READY
from tests.edge.aggregator import Aggregator, open_aggregator
from wire.errors import EnrolmentError

DEADLINE_SECONDS = 60.0
WINDOW = np.linspace(-1, 1, 12).astype(np.float32)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < until, "it did not come that far"
        time.sleep(0.02)


def enrol(aggregator: Aggregator, state: Path, device: str) -> int:
    token = state.parent / "token"
    token.write_text(aggregator.token(device=device) + "\n")
    return main(["enroll", "--token-file", str(token), "--state", str(state)])


@pytest.fixture(scope="module")
def aggregator(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aggregator]:
    """Of its own: a broker keeps the births of the devices that it has met."""
    with open_aggregator(bundle, tmp_path_factory.mktemp("aggregator")) as opened:
        yield opened


@pytest.fixture(scope="module")
def installed(aggregator: Aggregator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped device that has a model and owes an update."""
    state = tmp_path_factory.mktemp("broken") / "state"
    assert enrol(aggregator, state, "gate-1") == 0
    with Agent.from_folder(state) as agent:
        assert agent.wait_for_model(DEADLINE_SECONDS)
        wait_until(lambda: agent.state.connected)
    return state


@pytest.fixture
def state(installed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(installed, tmp_path / "state"))


def garbage_certificate(identity: Path) -> str:
    (identity / "certificate.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\nno\n")
    return "certificate.pem"


def garbage_in_the_next_authority(identity: Path) -> str:
    with (identity / "ca.pem").open("ab") as file:
        file.write(b"-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    return "ca.pem"


def truncated_key(identity: Path) -> str:
    (identity / "update.key").write_bytes((identity / "update.key").read_bytes()[:9])
    return "update.key"


def missing_file(identity: Path) -> str:
    (identity / "enrolment.json").unlink()
    return "enrolment.json"


def folder_for_a_file(identity: Path) -> str:
    (identity / "tls.key").unlink()
    (identity / "tls.key").mkdir()
    return "tls.key"


def file_for_the_folder(identity: Path) -> str:
    shutil.rmtree(identity)
    identity.write_bytes(b"somebody's")
    return "holds no identity"


def open_to_others(identity: Path) -> str:
    os.chmod(identity / "tls.key", 0o644)
    return "chmod 600"


BREAKAGES = (
    garbage_certificate,
    garbage_in_the_next_authority,
    truncated_key,
    missing_file,
    folder_for_a_file,
    file_for_the_folder,
    open_to_others,
)


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda each: each.__name__)
def test_device_without_identity_answers_and_says_what_is_wrong(
    state: Path,
    breakage: Callable[[Path], str],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    named = breakage(state / "identity")
    with caplog.at_level(logging.ERROR), Agent.from_folder(state) as agent:
        assert agent.infer(WINDOW).release_version == 1
        wait_until(lambda: agent.pulse.answer(READY) == (200, "alone"))
        assert named in repr([vars(record) for record in caplog.records])
        wait_until(lambda: bool((read_status(state) or {}).get("identity_trouble")))
        assert main(["check", "--state", str(state)]) == 1
        told = capsys.readouterr().out
        assert "fail  identity" in told
        assert named in told
        assert "ok    model" in told
        assert "broker" not in told
        assert (
            "certificate" in (findings := {each.name: each.level for each in agent.health.findings})
            or not findings
        )
        assert not agent.state.connected
    assert agent.parts.outgoing.sent_bytes_total == 0


def test_key_that_is_damaged_is_kept_for_its_owner_alone(state: Path) -> None:
    truncated_key(state / "identity")
    damaged = (state / "identity" / "update.key").read_bytes()
    with Agent.from_folder(state) as agent:
        assert agent.infer(WINDOW).release_version == 1
        (kept,) = agent.parts.database.quarantine.entries()
        assert "update.key is damaged" in kept[2]
        assert agent.parts.database.quarantine.read(kept[0]) == damaged
    for path in (state / "quarantine").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path.name


def test_device_goes_on_in_its_own_name_when_its_file_is_back(installed: Path, state: Path) -> None:
    garbage_certificate(state / "identity")
    with Agent.from_folder(state) as agent:
        wait_until(lambda: bool(agent.parts.identity_trouble))
        assert agent.identity.device == "unknown"
        shutil.copy(installed / "identity" / "certificate.pem", state / "identity" / "certificate.pem")
        wait_until(lambda: agent.state.connected)
        assert agent.identity.device == "gate-1"
        wait_until(lambda: agent.pulse.answer(READY) == (200, "ready"))


def test_device_that_is_enrolled_anew_owes_nothing_of_its_old_name(
    aggregator: Aggregator, state: Path
) -> None:
    with Agent.from_folder(state) as agent:
        agent.parts.outbox.put(
            b"u" * 16, b"o" * 16, "run", 1, "up", b"of the old name", agent.parts.clock.now(), 4e9
        )
    truncated_key(state / "identity")
    with Agent.from_folder(state) as agent:
        wait_until(lambda: bool(agent.parts.identity_trouble))
        assert agent.parts.outbox.depth() == 1
        assert enrol(aggregator, state, "gate-9") == 0
        wait_until(lambda: agent.state.connected)
        assert agent.infer(WINDOW).release_version == 1
        assert agent.identity.device == "gate-9"
        assert agent.parts.outbox.ended(b"u" * 16) == (
            "destroyed",
            "made as acme/gates/gate-1, and enrolled anew as acme/gates/gate-9",
        )
    with Agent.from_folder(state) as agent:
        assert agent.parts.outbox.totals()["destroyed"] == 1


def test_device_without_identity_and_without_model_does_not_start(state: Path) -> None:
    truncated_key(state / "identity")
    shutil.rmtree(state / "slots")
    with pytest.raises(EnrolmentError, match=r"update\.key"):
        Agent.from_folder(state)
    (state / "slots").mkdir()
    for _ in range(2):  # the lock is given back
        with pytest.raises(EnrolmentError, match=r"update\.key"):
            Agent.from_folder(state)
