"""Every check's verdict over facts, and what each remedy wants."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from edge_agent.checks import CHECKS, judge_all
from edge_agent.checks.facts import Facts
from edge_agent.remedies import prescribe
from edge_agent.settings import HealthSettings
from edge_agent.vitals.metrics import REMEDY_NAMES
from wire.messages import CheckName, RemedyName

LIMITS = HealthSettings()
MIB = 2**20
DAY = 86_400.0
WELL: dict[str, Any] = {
    "free_bytes": 1000 * MIB,
    "is_connected": True,
    "release_version": 3,
    "requests": 50,
    "celsius": 50.0,
    "owed": 0,
    "certificate_seconds": 20 * DAY,
    "certificate_life_seconds": 30 * DAY,
}


def found(**changes: Any) -> dict[str, str]:
    """What is not ok, by check."""
    findings = judge_all(Facts(**{**WELL, **changes}), LIMITS)
    assert [finding.name for finding in findings] == [check.NAME for check in CHECKS]
    assert all(finding.hint for finding in findings if finding.level != "ok")
    return {finding.name: finding.level for finding in findings if finding.level != "ok"}


def wanted(**changes: Any) -> list[str]:
    """The remedies of a device."""
    return [each.remedy for each in prescribe(Facts(**{**WELL, **changes}), LIMITS)]


def test_names_are_those_of_the_wire() -> None:
    assert tuple(check.NAME for check in CHECKS) == get_args(CheckName)
    assert set(REMEDY_NAMES) == set(get_args(RemedyName))


def test_device_that_is_well_has_no_finding_and_needs_nothing() -> None:
    assert found() == {}
    assert wanted() == []


def test_device_that_nothing_is_known_of_is_not_ill() -> None:
    findings = judge_all(Facts(release_version=1), LIMITS)
    assert {finding.level for finding in findings} == {"ok"}
    assert prescribe(Facts(release_version=1), LIMITS) == ()


@pytest.mark.parametrize(
    ("changes", "verdict", "remedies"),
    [
        ({"free_bytes": 63 * MIB}, {"disk": "warn"}, ["trim"]),
        ({"free_bytes": 7 * MIB}, {"disk": "fail"}, ["pause_training", "trim"]),
        ({"free_bytes": 64 * MIB}, {}, []),
        ({"disk_trouble": "cannot be written"}, {"disk": "fail"}, ["pause_training"]),
        ({"behind_seconds": 61.0}, {"clock": "warn"}, []),
        ({"skew_seconds": -61.0}, {"clock": "fail"}, []),
        ({"skew_seconds": 59.0, "behind_seconds": 1e6}, {}, []),
        ({"is_connected": False, "away_seconds": 5.0}, {"broker": "warn"}, []),
        ({"is_connected": False, "away_seconds": 3601.0}, {"broker": "fail"}, []),
        ({"broker_trouble": "refused"}, {"broker": "fail"}, []),
        ({"fruitless_sends": 5}, {"broker": "warn"}, ["reconnect"]),
        ({"fruitless_sends": 5, "is_connected": False}, {"broker": "warn"}, []),
        ({"fruitless_sends": 4}, {}, []),
        ({"release_version": 0}, {"model": "warn"}, []),
        ({"model_trouble": "does not load"}, {"model": "fail"}, []),
        ({"errors": 1}, {"model": "warn"}, []),
        ({"errors": 50}, {"model": "fail"}, []),
        ({"watched": "slow", "is_on_probation": True}, {"model": "fail"}, ["roll_back"]),
        ({"watched": "slow"}, {"model": "fail"}, []),
        ({"celsius": 84.0}, {"heat": "warn"}, []),
        ({"celsius": 85.0}, {"heat": "fail"}, ["pause_training"]),
        ({"owed": 65}, {"backlog": "warn"}, []),
        ({"owed": 2, "owed_bytes": 90, "owed_limit_bytes": 100}, {"backlog": "warn"}, []),
        ({"owed": 65, "owed_bytes": 90, "owed_limit_bytes": 100}, {"backlog": "fail"}, []),
        ({"certificate_seconds": 5 * DAY}, {"certificate": "warn"}, ["renew"]),
        ({"certificate_seconds": -1.0}, {"certificate": "fail"}, ["renew"]),
    ],
)
def test_trouble_is_found_and_answered(
    changes: dict[str, Any], verdict: dict[str, str], remedies: list[str]
) -> None:
    assert found(**changes) == verdict
    assert wanted(**changes) == remedies


@pytest.mark.parametrize(
    ("celsius", "paused_seconds", "stays"),
    [(80.0, 10_000.0, True), (70.0, 10_000.0, False), (70.0, 60.0, True)],
)
def test_paused_training_waits_for_the_machine_to_cool_and_does_not_flutter(
    celsius: float, paused_seconds: float, stays: bool
) -> None:
    remedies = wanted(celsius=celsius, is_training_paused=True, paused_seconds=paused_seconds)
    assert remedies == (["pause_training"] if stays else [])
