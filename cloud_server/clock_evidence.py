"""Whether the aggregator's clock can be right, before anything is signed by it: devices that believed a clock which ran
ahead would take everything that is signed afterwards for expired.

Laws of the file: the judgement is pure; each witness is of its own kind (what we signed before, the build, the
database's clock, the fleet's), and none of them is believed where it can be wrong by itself: devices count only when
many of them agree with each other. The operator may vouch for the clock, up to a date. Source: docs/how-to/operate.md.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from process.clock import Clock
from wire.errors import TrustError

BUILT: Final = 1_767_225_600.0
"""2026-01-01: no copy of this version is older."""
LOOK_SECONDS: Final = 10.0
_STEP_SECONDS: Final = 5.0
"""The clock and the machine's counter part by more than this: somebody set the clock."""
_DAY: Final = 86_400.0
FEWEST_DEVICES: Final = 5
AGREE_SECONDS: Final = 60.0
"""Half of the devices that were heard lately must be within this of each other: then somebody keeps their time."""
HEARD_SECONDS: Final = 600.0
REMEMBERED_DEVICES: Final = 1024
HINT: Final = (
    "set the clock (NTP), or vouch for it: clock.vouched_until in settings.toml, a date that it may reach"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockLimits:
    """Attributes:
    max_jump_seconds: the longest that nothing was signed or written; inf: any.
    max_ahead_seconds: how far our clock may be ahead of another one.
    vouched_until: up to this time (unix seconds) an operator says that the clock is right.
    """

    max_jump_seconds: float = 366.0 * _DAY
    max_ahead_seconds: float = 300.0
    vouched_until: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known about the time, each in unix seconds, None where there is no such witness.

    Attributes:
        now: by our clock.
        newest: when we signed or wrote something last.
        database: by the database server's clock.
        devices_ahead: seconds that we are ahead of the fleet.
    """

    now: float
    newest: float | None = None
    database: float | None = None
    devices_ahead: float | None = None


def judge_clock(found: Evidence, limits: ClockLimits) -> str:
    """Why the clock cannot be right; empty when nothing speaks against it."""
    if found.now < BUILT:
        return f"the clock says {_date(found.now)}, which is before this program was made"
    if found.now <= limits.vouched_until:
        return ""
    if found.newest is not None and found.now - found.newest > limits.max_jump_seconds:
        days = (found.now - found.newest) / _DAY
        return f"the clock says {_date(found.now)}, {days:.0f} days after anything was last signed here"
    if found.database is not None and found.now - found.database > limits.max_ahead_seconds:
        return f"the clock is {found.now - found.database:.0f} s ahead of the database's"
    if found.devices_ahead is not None and found.devices_ahead > limits.max_ahead_seconds:
        return f"the clock is {found.devices_ahead:.0f} s ahead of the devices', which agree with each other"
    return ""


class DeviceClocks:
    """What devices said about the time lately; of the last so many that were heard."""

    def __init__(self) -> None:
        self._told: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def note(self, device: str, told: float, monotonic: float) -> None:
        """A heartbeat said `told` (unix seconds)."""
        self._told[device] = (told, monotonic)
        self._told.move_to_end(device)
        while len(self._told) > REMEMBERED_DEVICES:
            self._told.popitem(last=False)

    def ahead(self, now: float, monotonic: float) -> float | None:
        """How far our clock is ahead of the middle of the fleet's (seconds, negative: behind); None when too few were
        heard, or they do not agree with each other."""
        ahead = sorted(
            now - (told + monotonic - heard)
            for told, heard in self._told.values()
            if monotonic - heard <= HEARD_SECONDS
        )
        if len(ahead) < FEWEST_DEVICES:
            return None
        lower, middle, upper = statistics.quantiles(ahead, n=4, method="inclusive")
        return middle if upper - lower <= AGREE_SECONDS else None


class ClockGuard:
    """Asked before anything is signed or sent.

    Args:
        look: gathers what is known; called at most every `LOOK_SECONDS`, and at once after the clock was set.
    """

    def __init__(self, clock: Clock, limits: ClockLimits, look: Callable[[], Evidence]) -> None:
        self._clock = clock
        self._limits = limits
        self._look = look
        self._looked_at = -math.inf
        self._offset = 0.0

    def check(self) -> None:
        """Raises:
        TrustError: (operator) the clock cannot be right; says why and what to do.
        StorageError: (disk) what is known cannot be read.
        """
        now, monotonic = self._clock.now(), self._clock.monotonic()
        is_set = abs(now - monotonic - self._offset) > _STEP_SECONDS
        if not is_set and monotonic - self._looked_at < LOOK_SECONDS:
            return
        if trouble := judge_clock(self._look(), self._limits):
            raise TrustError(f"nothing is signed: {trouble}", hint=HINT)
        self._looked_at, self._offset = monotonic, now - monotonic


def _date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f}"
