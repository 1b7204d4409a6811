"""Every check's verdict over facts, and what each remedy wants: the aggregator's."""

from __future__ import annotations

from typing import Any

import pytest

from cloud_server.checks import CHECKS, judge_all
from cloud_server.checks.facts import Facts
from cloud_server.remedies import prescribe
from cloud_server.settings import HealthSettings

LIMITS = HealthSettings()
MIB = 2**20
DAY = 86_400.0
WELL: dict[str, Any] = {
    "free_bytes": 10_000 * MIB,
    "is_connected": True,
    "present": 3,
    "silent_seconds": 1.0,
    "quiet_seconds": 240.0,
    "models": 1,
    "run": "main",
    "run_status": "active",
    "release_version": 2,
    "waiting_share": 0.0,
    "signatures": {"timestamp": DAY},
    "certificates": {"ca": 3000 * DAY, "server": 800 * DAY},
}


def found(**changes: Any) -> dict[str, str]:
    """What is not ok, by check."""
    findings = judge_all(Facts(**{**WELL, **changes}), LIMITS)
    assert [finding.name for finding in findings] == [check.NAME for check in CHECKS]
    assert all(finding.hint for finding in findings if finding.level != "ok")
    return {finding.name: finding.level for finding in findings if finding.level != "ok"}


def wanted(**changes: Any) -> list[str]:
    """The remedies of an aggregator."""
    return [each.remedy for each in prescribe(Facts(**{**WELL, **changes}), LIMITS)]


def test_aggregator_that_is_well_has_no_finding_and_needs_nothing() -> None:
    assert found() == {}
    assert wanted() == []


@pytest.mark.parametrize(
    ("changes", "verdict", "remedies"),
    [
        ({"free_bytes": 511 * MIB}, {"disk": "warn"}, ["trim"]),
        ({"free_bytes": 63 * MIB}, {"disk": "fail"}, ["pause_training", "trim"]),
        ({"disk_trouble": "cannot be written"}, {"disk": "fail"}, ["pause_training"]),
        ({"behind_seconds": 61.0}, {"clock": "fail"}, []),
        ({"clock_trouble": "the clock is 400 s ahead of the database's"}, {"clock": "fail"}, []),
        ({"database_trouble": "locked"}, {"database": "fail"}, []),
        ({"is_fenced_off": True}, {"database": "fail"}, []),
        ({"is_connected": False, "away_seconds": 3.0}, {"broker": "warn"}, []),
        ({"is_connected": False, "away_seconds": 301.0}, {"broker": "fail"}, []),
        ({"silent_seconds": 241.0}, {"broker": "warn"}, ["reconnect"]),
        ({"silent_seconds": 241.0, "present": 0}, {}, []),
        ({"silent_seconds": 241.0, "is_connected": False}, {"broker": "warn"}, []),
        ({"broker_trouble": "refused", "is_connected": None}, {"broker": "fail"}, []),
        ({"models": 0}, {"model": "warn"}, []),
        ({"release_version": 0}, {"model": "warn"}, []),
        ({"run_status": "paused"}, {"model": "warn"}, []),
        ({"run_status": "exhausted"}, {"model": "warn"}, []),
        ({"waiting_share": 0.6}, {"backlog": "warn"}, []),
        ({"dropped": 1}, {"backlog": "fail"}, []),
        ({"certificates": {"server": -1.0}}, {"certificate": "fail"}, []),
        ({"signatures": {"timestamp": -1.0}}, {"certificate": "fail"}, []),
        ({"certificate_trouble": "server.pem is no certificate"}, {"certificate": "fail"}, []),
        ({"signatures_due": ("root",)}, {"certificate": "warn"}, []),
        ({"renewable": frozenset(["server"])}, {"certificate": "warn"}, ["renew"]),
        ({"certificates": {"ca": 300 * DAY}}, {"certificate": "warn"}, []),
    ],
)
def test_trouble_is_found_and_answered(
    changes: dict[str, Any], verdict: dict[str, str], remedies: list[str]
) -> None:
    assert found(**changes) == verdict
    assert wanted(**changes) == remedies


@pytest.mark.parametrize(
    ("mib", "held_seconds", "stays"),
    [(300, 10_000.0, True), (600, 10_000.0, False), (600, 60.0, True)],
)
def test_held_rounds_wait_for_room_and_do_not_flutter(mib: int, held_seconds: float, stays: bool) -> None:
    remedies = wanted(free_bytes=mib * MIB, is_held=True, held_seconds=held_seconds)
    assert ("pause_training" in remedies) == stays
