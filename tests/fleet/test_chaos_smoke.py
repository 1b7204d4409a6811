"""Whole fleets under faults, a few seconds of them: what `shoal-fleet chaos` plays by the thousand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from fleet.chaos.campaign import laboratory, play
from fleet.chaos.faults import POINTS, UPDATES_PER_FAULT, make_schedule
from fleet.chaos.injector import Line
from fleet.chaos.template import Template


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with laboratory() as made:
        yield made


@pytest.mark.parametrize("seed", range(3))
def test_history_under_faults_loses_and_doubles_nothing(template: Template, seed: int) -> None:
    outcome = play(template, seed, make_schedule(seed, 6))
    assert [str(violation) for violation in outcome.violations] == []
    assert len(outcome.struck) >= 4
    assert outcome.made >= UPDATES_PER_FAULT * len(outcome.struck)
    assert outcome.rounds > 2
    assert set(outcome.standings) <= {
        "stored",
        "folded",
        "refused",
        "late",
        "discarded",
        "device open",
        "device expired",
    }


def test_history_is_the_same_each_time_it_is_played(template: Template) -> None:
    traces: list[list[Line]] = [[], []]
    outcomes = [play(template, 7, make_schedule(7, 5), trace.append) for trace in traces]
    assert traces[0] == traces[1]
    assert len(traces[0]) > 10
    assert dataclasses.replace(outcomes[0], visits=outcomes[1].visits) == outcomes[1]
    assert outcomes[0].visits == outcomes[1].visits


def test_schedules_of_seeds_after_one_another_reach_every_point() -> None:
    reached = {fault.point for seed in range(20) for fault in make_schedule(seed, 10)}
    assert reached == set(POINTS)


def test_schedule_without_some_of_its_faults_leaves_the_others_as_they_were() -> None:
    whole = make_schedule(3, 20)
    assert make_schedule(3, 20) == whole
    assert [fault.rng().random() for fault in whole[5:]] == [fault.rng().random() for fault in whole][5:]
