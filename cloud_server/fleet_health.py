"""What devices say of their own health in their heartbeats.

Laws of the file: a device's word is not in the books (it may lie, and must not write them); a device that speaks
without end fills no log: one line in `QUIET_SECONDS` for each of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from process.logs import get_logger
from wire.messages import Telemetry

_log = get_logger("cloud.fleet")

QUIET_SECONDS: Final = 60.0
MOST_AT_ONCE: Final = 100
"""More remedies than an agent gives between two heartbeats: what a liar adds to the count is bounded."""


@dataclass(slots=True)
class _Told:
    """What a device said last, and what of it the log does not have yet."""

    unwell: tuple[str, ...] = ()
    logged: tuple[str, ...] = ()
    counted: dict[str, int] = field(default_factory=dict)
    unlogged: Counter[str] = field(default_factory=Counter)
    logged_at: float | None = None


class FleetHealth:
    """The health of a fleet, as its devices tell it. On the loop's thread; the counts from any."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}
        self._remedies: Counter[str] = Counter()

    def note(self, device: str, telemetry: Telemetry, now: float) -> None:
        """Takes a heartbeat.

        Args:
            now: monotonic seconds.
        """
        told = self._told.setdefault(device, _Told())
        told.unwell = telemetry.unwell
        counts = {str(name): count for name, count in telemetry.remedies.items()}
        for name, count in counts.items():
            before = told.counted.get(name, 0)
            # Counts begin at 0 again with a device's next start.
            given = min(count - before if count >= before else count, MOST_AT_ONCE)
            if given:
                told.unlogged[name] += given
                self._remedies[name] += given
        told.counted = counts
        is_news = told.unwell != told.logged or told.unlogged
        if is_news and (told.logged_at is None or now - told.logged_at >= QUIET_SECONDS):
            told.logged_at = now
            self._log(device, told)

    def _log(self, device: str, told: _Told) -> None:
        given, told.unlogged, told.logged = told.unlogged, Counter(), told.unwell
        say = _log.warning if told.unwell else _log.info
        say(
            "device_health",
            device=device,
            failing=",".join(told.unwell) or "nothing",
            remedies=",".join(f"{name}={count}" for name, count in sorted(given.items())) or "none",
        )

    def unwell(self) -> dict[str, float]:
        """Devices that fail each check."""
        counted = Counter(name for told in list(self._told.values()) for name in told.unwell)
        return {name: float(count) for name, count in counted.items()}

    def remedies(self) -> dict[str, float]:
        """Remedies that devices carried out by themselves, as far as heartbeats told."""
        return {name: float(count) for name, count in dict(self._remedies).items()}
