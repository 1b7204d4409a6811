"""Rows and their table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import __main__ as command
from bench.table import Row, interleaved_medians, render


@pytest.mark.parametrize(
    ("value", "goal", "is_met"),
    [
        (10.0, ">= 10", True),
        (9.9, ">= 10", False),
        (84.0, "<= 85", True),
        (86.0, "<= 85", False),
        (1.0, "", None),
    ],
)
def test_row_meets_its_goal_up_to_the_bound(value: float, goal: str, is_met: bool | None) -> None:
    assert Row("figure", value, goal).is_met is is_met


def test_table_names_what_was_missed() -> None:
    lines = render(
        [Row("fast", 12.0, ">= 10"), Row("slow", 2.0, ">= 10", note="why"), Row("free", 3.0)]
    ).splitlines()
    assert [("MISSED" in line, " met " in line) for line in lines] == [
        (False, False),
        (False, True),
        (True, False),
        (False, False),
    ]
    assert lines[2].endswith("why")


def test_interleaved_medians_call_both_in_turns() -> None:
    calls: list[str] = []
    first, second = interleaved_medians(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3)
    assert calls == ["a", "b"] * 4
    assert first > 0.0
    assert second > 0.0


def test_command_prints_a_table_and_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "gpu", "--out", str(tmp_path / "out")])
    assert command.main() == 0
    rows = json.loads((tmp_path / "out" / "bench.json").read_bytes())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows) + 1
    for line, row in zip(printed[1:], rows, strict=True):
        assert line.startswith(row["name"])
        assert row["value"] > 0.0


def test_command_names_the_benchmarks_when_there_is_no_such_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "flowers"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "no benchmark is called 'flowers'; there are sealing" in capsys.readouterr().err


@pytest.mark.parametrize("name", command.ALL)
def test_every_benchmark_has_a_measure(name: str) -> None:
    import importlib

    assert callable(importlib.import_module(f"bench.{name}").measure)
