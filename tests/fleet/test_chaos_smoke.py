"""Whole fleets under faults, some seconds of what `shoal-fleet chaos` plays, and what once failed there.

`chaos_regressions.json` keeps failing histories, shrunk to the fewest faults; a new one is added with its repair.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet.chaos.campaign import laboratory, play
from fleet.chaos.faults import POINTS, UPDATES_PER_FAULT, Fault, make_schedule
from fleet.chaos.injector import Line
from fleet.chaos.plays import PLAYS, play_named, play_of, schedule_of
from fleet.chaos.shrink import shrink
from fleet.chaos.template import Template

KEPT: list[dict[str, Any]] = json.loads(Path(__file__).with_name("chaos_regressions.json").read_text())
PLACES = {"stored", "folded", "refused", "late", "discarded", "device open", "device expired"}


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with laboratory() as made:
        yield made


@pytest.mark.parametrize("play_name", ["clipped", "masked", "private", "buffered", "app"])
def test_history_under_faults_loses_and_doubles_nothing(template: Template, play_name: str) -> None:
    seed = next(seed for seed in range(len(PLAYS)) if play_of(seed).name == play_name)
    outcome = play(template, seed, schedule_of(seed, 4))
    assert [str(violation) for violation in outcome.violations] == []
    assert len(outcome.struck) >= 3
    assert outcome.made >= UPDATES_PER_FAULT * len(outcome.struck)
    assert outcome.rounds > 2
    assert set(outcome.standings) <= PLACES


def test_history_is_the_same_each_time_it_is_played(template: Template) -> None:
    traces: list[list[Line]] = [[], []]
    outcomes = [play(template, 7, schedule_of(7, 2), trace.append) for trace in traces]
    assert traces[0] == traces[1]
    assert any("FAULT" in line.what for line in traces[0])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kept", KEPT, ids=[kept["name"] for kept in KEPT])
def test_history_that_once_failed_does_not_fail_again(template: Template, kept: dict[str, Any]) -> None:
    schedule = tuple(Fault(**fault) for fault in kept["faults"])
    outcome = play(template, kept["seed"], schedule, play=play_named(kept["play"]))
    assert [str(violation) for violation in outcome.violations] == []
    assert outcome.struck == schedule, "its faults still find their points"


def test_schedules_of_seeds_after_one_another_reach_every_point() -> None:
    reached = {fault.point for seed in range(8 * len(PLAYS)) for fault in schedule_of(seed, 10)}
    assert reached == set(POINTS)


def test_schedule_without_some_of_its_faults_leaves_the_others_as_they_were() -> None:
    whole = make_schedule(3, 20)
    assert make_schedule(3, 20) == whole
    assert len({fault.rng().random() for fault in whole}) == len(whole)


def test_failing_schedule_is_shrunk_to_the_faults_that_it_needs() -> None:
    whole = make_schedule(5, 40)
    needed = {whole[7], whole[31]}
    tries: list[int] = []

    def fails(part: tuple[Fault, ...]) -> bool:
        tries.append(len(part))
        return needed <= set(part)

    assert set(shrink(whole, fails)) == needed
    assert len(tries) < 100
