"""Windows, days and months of a link: by the local clock, over midnight, and when clocks change."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from math import inf
from zoneinfo import ZoneInfo

import pytest

from edge_agent.link.windows import Calendar, parse_window, parse_zone
from wire.errors import ConfigurationError

BERLIN = ZoneInfo("Europe/Berlin")


def wall(text: str) -> float:
    """Unix seconds of a moment in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def calendar(*windows: str, zone: str = "UTC", month_begins: int = 1) -> Calendar:
    return Calendar([parse_window(text) for text in windows], parse_zone(zone), month_begins)


@pytest.mark.parametrize(
    ("moment", "is_open", "change"),
    [
        ("2026-11-21T01:59:59", False, "2026-11-21T02:00"),
        ("2026-11-21T02:00", True, "2026-11-21T05:00"),
        ("2026-11-21T04:59:59.999", True, "2026-11-21T05:00"),
        ("2026-11-21T05:00", False, "2026-11-21T22:30"),
        ("2026-11-21T23:59:30", True, "2026-11-22T00:15"),
        ("2026-11-22T00:14:59", True, "2026-11-22T00:15"),
        ("2026-11-22T00:15", False, "2026-11-22T02:00"),
    ],
)
def test_window_opens_and_shuts_to_the_minute_and_crosses_midnight(
    moment: str, is_open: bool, change: str
) -> None:
    found = calendar("02:00-05:00", "22:30-00:15")
    assert found.is_open(wall(moment)) is is_open
    assert found.next_change(wall(moment)) == wall(change)


def test_link_without_windows_is_always_open_and_the_whole_day_is_a_window() -> None:
    assert calendar().next_change(wall("2026-11-21T12:00")) == inf
    whole = calendar("00:00-24:00")
    assert whole.is_open(wall("2026-11-21T23:59:59"))
    assert whole.next_change(wall("2026-11-21T12:00")) == inf


@pytest.mark.parametrize(
    ("day", "minutes"),
    [
        pytest.param("2026-03-28", 180, id="an ordinary day"),
        pytest.param("2026-03-29", 120, id="clocks go forward at 02:00, which is 03:00"),
        pytest.param("2026-10-25", 240, id="clocks go back at 03:00, and 02:00 comes twice"),
    ],
)
def test_window_follows_the_local_clock_when_it_changes(day: str, minutes: int) -> None:
    night = calendar("02:00-05:00", zone="Europe/Berlin")
    begin = datetime.fromisoformat(day).replace(tzinfo=BERLIN).timestamp()
    opened = [minute for minute in range(26 * 60) if night.is_open(begin + 60.0 * minute)]
    today = [
        minute
        for minute in opened
        if datetime.fromtimestamp(begin + 60 * minute, BERLIN).day == int(day[-2:])
    ]
    assert len(today) == minutes
    changes, moment = [], begin
    while (moment := night.next_change(moment)) < begin + 12 * 3600:
        changes.append(datetime.fromtimestamp(moment, BERLIN).strftime("%H:%M"))
    # When 02:00 to 02:59 comes twice, the window is one piece; when it does not come, it begins at 03:00.
    assert changes == [{"2026-03-29": "03:00"}.get(day, "02:00"), "05:00"]


def test_window_inside_of_the_hour_that_does_not_happen_opens_on_the_next_day() -> None:
    night = calendar("02:15-02:45", zone="Europe/Berlin")
    before = datetime(2026, 3, 28, 12, tzinfo=BERLIN).timestamp()
    assert night.next_change(before) == datetime(2026, 3, 30, 2, 15, tzinfo=BERLIN).timestamp()


def test_clock_that_is_set_back_or_absurd_is_judged_by_what_it_shows() -> None:
    found = calendar("02:00-05:00")
    assert found.is_open(wall("2026-11-21T03:00"))
    assert not found.is_open(wall("2026-11-21T01:00")), "the clock was set back by two hours"
    assert found.next_change(wall("2026-11-21T01:00")) == wall("2026-11-21T02:00")
    for absurd in (0.0, -1e12, 1e15, wall("2040-01-01T03:00")):
        found.is_open(absurd)
        assert found.next_change(absurd) > absurd
        assert found.day(absurd)[1] > 0


def test_machines_zone_is_that_of_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert calendar("02:00-05:00", zone="local").is_open(wall("2026-11-20T18:00"))  # 03:00 in Tokyo
        assert calendar(zone="local").day(wall("2026-11-20T18:00"))[0] == "2026-11-21"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("moment", "begins", "month", "ends"),
    [
        ("2026-11-21T12:00", 1, "2026-11-01", "2026-12-01T00:00"),
        ("2026-12-31T23:59", 1, "2026-12-01", "2027-01-01T00:00"),
        ("2026-11-14T12:00", 15, "2026-10-15", "2026-11-15T00:00"),
        ("2027-01-03T12:00", 28, "2026-12-28", "2027-01-28T00:00"),
    ],
)
def test_month_of_the_budget_begins_on_its_day(moment: str, begins: int, month: str, ends: str) -> None:
    assert calendar(month_begins=begins).month(wall(moment)) == (month, wall(ends))


def test_day_of_the_budget_is_the_local_one() -> None:
    berlin = calendar(zone="Europe/Berlin")
    assert berlin.day(wall("2026-03-28T23:30")) == ("2026-03-29", wall("2026-03-29T22:00")), "23 hours long"
    assert calendar().day(wall("2026-03-28T23:30")) == ("2026-03-28", wall("2026-03-29T00:00"))


@pytest.mark.parametrize(
    "text",
    ["", "2:00-5:00", "02:00", "02:00-24:30", "24:00-02:00", "02:00-02:00", "02:60-03:00", "٠٢:00-05:00"],
)
def test_text_that_is_no_window_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_window(text)
    assert caught.value.hint


def test_zone_that_nobody_knows_is_refused_with_a_hint() -> None:
    for name in ("Europe/Nowhere", "../etc/passwd", ""):
        with pytest.raises(ConfigurationError, match="zone") as caught:
            parse_zone(name)
        assert caught.value.hint
