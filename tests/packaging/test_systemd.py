"""The units of systemd: that it understands them, and that they agree with the programs."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cloud_server.cli import DEFAULT_STATE as CLOUD_STATE
from cloud_server.cli.helper_command import DEFAULT_FOLDER as HELPER_STATE
from edge_agent.cli import DEFAULT_STATE as EDGE_STATE

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "deploy" / "systemd"
DEADLINE_SECONDS = 120.0


def read(name: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNITS / name)
    return unit


@pytest.mark.parametrize("name", ["shoal-edge.service", "shoal-cloud.service", "shoal-helper.service"])
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_unit_is_understood_by_systemd(name: str, tmp_path: Path) -> None:
    """With a program that is there: whether ours is installed is not the unit's affair."""
    text = (UNITS / name).read_text()
    program = read(name)["Service"]["ExecStart"].split()[0]
    (tmp_path / name).write_text(text.replace(program, sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )
    # It ends with 0 also when it found something: what it says counts. Other units of the machine are not ours.
    assert [line for line in done.stderr.splitlines() if name in line] == []


@pytest.mark.parametrize(
    ("name", "state"), [("shoal-edge.service", EDGE_STATE), ("shoal-cloud.service", CLOUD_STATE)]
)
def test_unit_agrees_with_its_program(name: str, state: str) -> None:
    unit = read(name)
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) >= 120
    assert int(service["TimeoutStopSec"]) <= 10
    assert service["Restart"] == "always"
    assert f"SHOAL_STATE={state}" in service["Environment"]
    assert f"/var/lib/{service['StateDirectory']}" == state
    assert service["ExecStart"].split()[1:] == ["run"]


def test_unit_of_a_helper_agrees_with_its_program() -> None:
    service = read("shoal-helper.service")["Service"]
    assert service["Type"] == "notify"
    assert int(service["TimeoutStopSec"]) <= 10
    assert f"SHOAL_STATE={HELPER_STATE}" in service["Environment"]
    assert f"/var/lib/{service['StateDirectory']}" == HELPER_STATE
    assert service["ExecStart"].split()[1:] == ["helper", "run"]
