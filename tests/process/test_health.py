"""How often a remedy may be tried, and how findings are shown."""

from __future__ import annotations

import itertools

import pytest

from process.health import Finding, Prescription, Ration, exit_code, with_remedies

TRIM = Prescription("trim", "disk", "3 MiB free")
RENEW = Prescription("renew", "certificate", "5 hours are left")


def given(ration: Ration, moments: list[float], wanted: list[Prescription]) -> list[float]:
    """The moments at which the first of the prescriptions was allowed."""
    found = []
    for now in moments:
        allowed, ration = ration.allow(wanted, now, 600.0)
        if wanted[0] in allowed:
            found.append(now)
    return found


def test_remedy_that_does_not_help_is_tried_less_and_less_often() -> None:
    every_minute = [60.0 * n for n in range(200)]
    assert given(Ration(), every_minute, [TRIM]) == [0.0, 600.0, 1800.0, 4200.0, 9000.0]


def test_remedy_is_tried_at_least_once_a_day() -> None:
    every_hour = [3600.0 * n for n in range(24 * 12)]
    moments = given(Ration(), every_hour, [TRIM])
    assert max(b - a for a, b in itertools.pairwise(moments)) == 86_400.0


def test_remedy_that_helped_begins_anew_but_not_at_once() -> None:
    _, ration = Ration().allow([TRIM], 0.0, 600.0)
    _, ration = ration.allow([TRIM], 600.0, 600.0)
    _, ration = ration.allow([], 700.0, 600.0)
    assert ration.allow([TRIM], 800.0, 600.0)[0] == ()
    allowed, ration = ration.allow([TRIM], 1200.0, 600.0)
    assert allowed == (TRIM,)
    assert ration.allow([TRIM], 1800.0, 600.0)[0] == (TRIM,)


def test_remedies_are_rationed_one_by_one() -> None:
    allowed, ration = Ration().allow([TRIM], 0.0, 600.0)
    assert allowed == (TRIM,)
    assert ration.allow([TRIM, RENEW], 1.0, 600.0)[0] == (RENEW,)


@pytest.mark.parametrize(("levels", "code"), [(["ok", "warn"], 0), (["ok", "fail"], 1), ([], 0)])
def test_exit_code_is_that_of_a_failure(levels: list[str], code: int) -> None:
    assert exit_code(Finding("disk", level, "") for level in levels) == code  # type: ignore[arg-type]


def test_finding_shows_what_to_do_and_what_is_done() -> None:
    finding = Finding("disk", "warn", "3 MiB free", "free some")
    shown = with_remedies([finding, Finding("clock", "ok", "fine", "hint")], [TRIM])
    assert shown[0].lines() == [
        "warn  disk         3 MiB free",
        "                   hint: free some",
        "                   remedy: trim",
    ]
    assert shown[1].lines() == ["ok    clock        fine"]
