"""Histories that once failed, shrunk to the fewest faults: none of them may fail again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.chaos.campaign import laboratory, play
from fleet.chaos.faults import POINTS, Fault
from fleet.chaos.template import Template

KEPT: list[dict[str, Any]] = json.loads(Path(__file__).with_name("chaos_regressions.json").read_text())


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with laboratory() as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("kept", KEPT, ids=[kept["name"] for kept in KEPT])
def test_history_that_once_failed_does_not_fail_again(template: Template, kept: dict[str, Any]) -> None:
    schedule = tuple(Fault(**fault) for fault in kept["faults"])
    outcome = play(template, kept["seed"], schedule)
    assert [str(violation) for violation in outcome.violations] == []
    assert outcome.struck == schedule, "its faults still find their points"


def test_kept_histories_name_points_and_faults_that_there_are() -> None:
    for kept in KEPT:
        for fault in kept["faults"]:
            assert fault["kind"] in POINTS[fault["point"]]
