"""The one distribution: what is in its wheel, and that its base install is all that a device needs (law 1)."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from models.bundle import Bundle
from tests.packaging.conftest import PACKAGES, ROOT, clean_environment

JOB = Path(__file__).with_name("device_job.py")
COMMANDS = ("shoal-edge", "shoal-cloud", "shoal-fleet")
# What a package may carry beside its code: the marker for type checkers, and Alembic's template.
DATA_SUFFIXES = {".typed", ".mako", ".json"}
BASE = {"onnxruntime", "numpy", "paho-mqtt", "cryptography", "cbor2", "tuf", "msgspec"}


def names_in(wheel: Path) -> list[PurePosixPath]:
    with zipfile.ZipFile(wheel) as archive:
        return [PurePosixPath(name) for name in archive.namelist()]


def metadata(wheel: Path) -> Any:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=clean_environment(), timeout=300
    )


def test_wheel_holds_every_module_of_the_tree(wheel: Path) -> None:
    built = {str(name) for name in names_in(wheel) if name.suffix == ".py"}
    tree = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert built == tree


def test_wheel_holds_code_and_no_data(wheel: Path) -> None:
    """Data sets stay in the clone: a device would carry megabytes that it never reads."""
    inside = [name for name in names_in(wheel) if not name.parts[0].endswith(".dist-info")]
    assert {name.suffix for name in inside} - {".py"} <= DATA_SUFFIXES
    assert {name.parts[0] for name in inside} == set(PACKAGES)


def test_wheel_marks_its_packages_as_typed(wheel: Path) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= {str(name) for name in names_in(wheel)}


def test_base_install_is_what_a_device_needs(wheel: Path) -> None:
    needed = metadata(wheel).get_all("Requires-Dist")
    base = {line.split(">")[0].split("=")[0].split("<")[0] for line in needed if "extra ==" not in line}
    assert base == BASE


@pytest.mark.slow
def test_commands_start_in_a_bare_environment(bare: Path) -> None:
    for command in COMMANDS:
        shown = run(bare / command, "--help")
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith(f"usage: {command}")


@pytest.mark.slow
@pytest.mark.parametrize("command", [("shoal-cloud", "status"), ("shoal-fleet", "demo")], ids=" ".join)
def test_command_of_an_extra_that_is_absent_names_the_extra(
    bare: Path, tmp_path: Path, command: tuple[str, str]
) -> None:
    place = ("--state", tmp_path) if command[0] == "shoal-cloud" else ("--out", tmp_path / "out")
    refused = run(bare / command[0], command[1], *place)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    extra = command[0].removeprefix("shoal-")
    assert f"pip install 'shoal[{extra}]'" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("interpreter", ["bare", "development"])
def test_device_answers_trains_and_seals_without_a_framework(
    interpreter: str, small_bundle: Bundle, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In the development environment the frameworks could be imported, and are not."""
    if interpreter == "bare":
        python = request.getfixturevalue("bare") / "python"
    else:
        python = Path(sys.executable)
    ended = run(python, JOB, small_bundle.folder, tmp_path)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["frameworks"] == []
    assert told["answers"] == [8, 3]
    assert told["loss"][1] < told["loss"][0]
    assert told["update_norm"] > 0
    assert 500 < told["sealed_bytes"] < 2**20
    assert 0 <= told["accuracy"] <= 1
    assert {"wire.envelope", "process.settings", "edge_agent.runtime", "edge_agent.inputs.topic"} <= set(
        told["modules"]
    )
    if interpreter == "bare":
        assert Path(told["from"]).is_relative_to(python.parent.parent), "the wheel was not what ran"


@pytest.mark.slow
def test_bare_environment_has_no_framework(bare: Path) -> None:
    listed = run(bare / "pip", "list", "--format", "json")
    installed = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert "shoal" in installed
    assert not installed & {"torch", "flwr", "onnx", "onnxscript", "ray", "sqlalchemy", "fastapi"}


@pytest.mark.slow
def test_offline_machine_signs_with_the_base_install_alone(bare: Path, tmp_path: Path) -> None:
    """Two folders: the aggregator's without offline keys, and the keys' without anything else."""
    from cloud_server.cli import main

    state, safe = tmp_path / "state", tmp_path / "safe"
    assert main(["init", "--state", str(state)]) == 0
    (state / "keys" / "offline").rename(safe)
    again = ["keys", "sign", "targets", "--state", str(state)]
    assert main([*again, "--request", str(tmp_path / "request")]) == 0
    signed = run(
        bare / "shoal-cloud", "sign", tmp_path / "request", "--keys", safe, "--out", tmp_path / "signed"
    )
    assert signed.returncode == 0, signed.stderr
    assert "targets of" in signed.stderr
    assert main([*again, "--signed", str(tmp_path / "signed")]) == 0
