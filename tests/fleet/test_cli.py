"""Wrong commands, files and settings at the door of `shoal-fleet`: one clear error, a hint, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleet.cli import main


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["demo", "--dataset", "nothing", "--out", "{tmp}/new"], 2, "smartwatch, fashion-mnist"),
        (["demo", "--out", "{tmp}"], 2, "not empty and not a demo's"),
        (["simulate", "--scenario", "{tmp}/absent.toml"], 2, "absent.toml"),
        (["simulate", "--scenario", "{tmp}/unknown.toml"], 2, "did you mean 'strategy'?"),
        (["simulate", "--scenario", "{tmp}/bounds.toml"], 2, "slow_share"),
        (["simulate", "--scenario", "{tmp}/binary.toml"], 2, "not UTF-8"),
        (["simulate", "--scenario", "{tmp}/nan.toml"], 2, "data.crop: nan"),
        (["simulate", "--scenario", "{tmp}/strategy.toml"], 2, "'FedNope'"),
        (["simulate", "--scenario", "{tmp}/masked.toml"], 2, "looks at single updates"),
        (["simulate", "--scenario", "{tmp}/private.toml"], 2, "noise that the aggregator adds"),
        (["simulate", "--scenario", ""], 2, "the path is empty"),
        (["simulate", "--out", "{tmp}/nan.toml"], 2, "is not a folder"),
        (["simulate", "--out", "/proc/nowhere"], 8, "/proc/nowhere cannot be made"),
        (["demo", "--rounds", "9999999999999999999999"], 2, "is not from 1 to"),
        (["simulate", "--model", "watch_cnn"], 2, "try watch_cnn1d"),
        (["simulate", "--model", "digits_mlp", "--devices", "500"], 2, "500 devices"),
        (["simulate", "--devices", "5", "--scenario", "{tmp}/real.toml"], 2, "--devices 16"),
    ],
)
def test_command_with_a_wrong_input_says_what_and_where(
    arguments: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unknown.toml").write_text('[run]\nstrateggy = "FedAvg"\n')
    (tmp_path / "real.toml").write_text('[data]\npeople = "real"\n')
    (tmp_path / "bounds.toml").write_text("[faults]\nslow_share = 7.0\n")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "nan.toml").write_text("[data]\ncrop = nan\n")
    masked = '[secure]\npolicy = "pairwise"\n[run]\nstrategy = '
    (tmp_path / "masked.toml").write_text(masked + '"FedMedian"\n')
    (tmp_path / "private.toml").write_text(masked + '"FedAvg"\n[privacy]\nmode = "central"\n')
    (tmp_path / "strategy.toml").write_text('[run]\nstrategy = "FedNope"\n')
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.partition(": ")[0] for line in captured.err.splitlines()] == ["error", "hint"]
    assert words in captured.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [[], ["demo", "--rounds", "0"], ["simulate", "--devices", "-3"], ["simulate", "--seed", "1.5"], ["fly"]],
)
def test_command_that_cannot_be_parsed_exits_with_two(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.partition(": ")[0] for line in captured.err.splitlines()] == ["error", "hint"]
