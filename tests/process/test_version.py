"""One version everywhere: the distribution's, the one that every command prints, and the one that agents say."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import cloud_server.cli
import edge_agent.cli
import fleet.cli
from process.version import VERSION

MAINS: dict[str, Callable[[list[str]], int]] = {
    "shoal-edge": edge_agent.cli.main,
    "shoal-cloud": cloud_server.cli.main,
    "shoal-fleet": fleet.cli.main,
}


def test_version_is_that_of_the_distribution() -> None:
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == VERSION


@pytest.mark.parametrize("command", MAINS)
def test_every_command_prints_the_version(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        MAINS[command](["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{command} {VERSION}\n"
