"""When a link may be used: windows of the local day, and where days and months begin.

A moment is inside of a window if the *local clock* shows a time inside of it. So a window may cross midnight; on the
day when clocks go forward, what it loses is lost (02:00-03:00 does not happen), and on the day when they go back, an
hour that comes twice counts twice. Laws of the file: pure; the machine's zone is asked only where no zone is named.
Source: docs/how-to/links.md.
"""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from math import inf
from typing import Final

from wire.errors import ConfigurationError

LOCAL: Final = "local"
DAY_SECONDS: Final = 86_400.0
_MINUTE: Final = 60.0
_MINUTES_A_DAY: Final = 24 * 60
_WINDOW: Final = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])-(?:([01][0-9]|2[0-3]):([0-5][0-9])|24:00)")
# A window may fall into the hour that a day lacks: the next one is then up to two days away.
_LOOK_AHEAD_MINUTES: Final = 3 * _MINUTES_A_DAY
# A clock that is absurd is somebody else's finding: windows go on from the nearest moment that a calendar has.
_EARLIEST, _LATEST = 86_400.0 * 31, datetime(9998, 1, 1, tzinfo=UTC).timestamp()


@dataclass(frozen=True, slots=True)
class Window:
    """Minutes of the local day, the end not included; one that ends before it begins crosses midnight."""

    begin: int
    end: int

    def holds(self, minute: int) -> bool:
        """Whether a minute of the day (0 … 1439) is inside."""
        if self.begin < self.end:
            return self.begin <= minute < self.end
        return minute >= self.begin or minute < self.end


def parse_window(text: str) -> Window:
    """`HH:MM-HH:MM`.

    Raises:
        ConfigurationError: (operator) not a window, or an empty one.
    """
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ConfigurationError(
            f"link.windows: {text[:40]!r} is not a window of the day", hint='such as "02:00-05:00"'
        )
    begin = int(found[1]) * 60 + int(found[2])
    end = _MINUTES_A_DAY if found[3] is None else int(found[3]) * 60 + int(found[4])
    if begin == end:
        raise ConfigurationError(
            f"link.windows: {text} is empty", hint="for the whole day: 00:00-24:00, or no window"
        )
    return Window(begin, end)


def parse_zone(name: str) -> tzinfo | None:
    """A time zone by its name; None for the machine's.

    Raises:
        ConfigurationError: (operator) this machine knows no zone of that name.
    """
    if name == LOCAL:
        return None
    if name == "UTC":
        return UTC  # needs no database of zones
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ConfigurationError(
            f"link.timezone: this machine knows no zone {name[:80]!r}",
            hint='"local", "UTC", or a name such as "Europe/Berlin" (Debian: apt install tzdata)',
        ) from error


class Calendar:
    """Windows, days and months of one place.

    Args:
        windows: none: it is always open.
        zone: None for the machine's.
        month_begins: day of the month (1 … 28) on which a month of the budget begins.
    """

    def __init__(self, windows: Sequence[Window], zone: tzinfo | None, month_begins: int = 1) -> None:
        self._windows = tuple(windows)
        self._zone = zone
        self._month_begins = month_begins
        self._known = (0.0, -1.0, True)  # from, until, open

    def is_open(self, wall: float) -> bool:
        """Whether the link may be used at this moment (unix seconds)."""
        return self._span(wall)[2]

    def next_change(self, wall: float) -> float:
        """When that changes (unix seconds); infinity when it never does."""
        return self._span(wall)[1]

    def day(self, wall: float) -> tuple[str, float]:
        """Name of the day of the budget, and when it ends (unix seconds)."""
        today = self._local(wall)
        return today.strftime("%Y-%m-%d"), self._midnight(today + timedelta(days=1))

    def month(self, wall: float) -> tuple[str, float]:
        """Name of the month of the budget (the day on which it began), and when it ends (unix seconds)."""
        today = self._local(wall)
        begun = today.replace(day=self._month_begins)
        if today.day < self._month_begins:
            begun = (today.replace(day=1) - timedelta(days=1)).replace(day=self._month_begins)
        ends = (begun.replace(day=1) + timedelta(days=32)).replace(day=self._month_begins)
        return begun.strftime("%Y-%m-%d"), self._midnight(ends)

    def _span(self, wall: float) -> tuple[float, float, bool]:
        """The time around `wall` in which nothing changes, and whether it is open."""
        if not self._windows:
            return 0.0, inf, True
        if not self._known[0] <= wall < self._known[1]:
            is_open = self._holds(wall)
            minute = wall - wall % _MINUTE
            steps = (minute + _MINUTE * number for number in range(1, _LOOK_AHEAD_MINUTES))
            until = next((step for step in steps if self._holds(step) != is_open), inf)
            # What never changes within the look ahead is looked at again.
            self._known = (wall, min(until, minute + _MINUTE * _LOOK_AHEAD_MINUTES), is_open)
            if until == inf:
                return wall, inf, is_open
        return self._known

    def _holds(self, wall: float) -> bool:
        local = self._local(wall)
        minute = local.hour * 60 + local.minute
        return any(window.holds(minute) for window in self._windows)

    def _local(self, wall: float) -> datetime:
        bounded = min(max(wall, _EARLIEST), _LATEST)
        return datetime.fromtimestamp(bounded, self._zone) if self._zone else datetime.fromtimestamp(bounded)

    @staticmethod
    def _midnight(day: datetime) -> float:
        return day.replace(hour=0, minute=0, second=0, microsecond=0, fold=0).timestamp()
