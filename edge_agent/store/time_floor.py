"""The latest time that something signed has told this device: a wrong clock must not bring expired metadata back.

Laws of the file: the floor moves only forward, and only by the build of this program and by what was verified: when a
release was made, when the fleet's metadata was signed, when an update was acknowledged. An acknowledgement moves it at
most to the end of the metadata that was verified last, so that a stolen key for orders cannot make a device refuse
everything for years, and at most an hour at once. Metadata move it at most a day ahead of a clock that is not behind:
an aggregator whose clock is in another year takes along only devices whose clocks are wrong, too. Source:
docs/architecture.md, "State folder of a device".
"""

from __future__ import annotations

import math
from typing import Final

from edge_agent.store.storage import Database
from process.clock import Clock

BUILT: Final = 1_767_225_600.0
"""2026-01-01: no copy of this version is older. A device that starts in 1970 counts from here."""
RECEIPT_LIFE_SECONDS: Final = 3600.0
"""A receipt ends so long after it was signed (docs/protocol.md)."""
RECEIPT_STEP_SECONDS: Final = 3600.0
"""The farthest that one receipt moves the floor beyond what the device takes for now."""
METADATA_STEP_SECONDS: Final = 86_400.0
"""The farthest ahead of a machine's clock that newest metadata move the floor, where that clock is not behind it."""
_FLOOR: Final = "time_floor"
_CEILING: Final = "time_ceiling"


class FlooredClock:
    """A clock that never reads earlier than the floor. Give it to whatever decides whether something has expired.

    Args:
        built: the floor of a device that knows nothing yet; a simulated one has a time of its own.
    """

    def __init__(self, clock: Clock, database: Database, *, built: float = 0.0) -> None:
        self._clock = clock
        self._database = database
        self._floor = max(built, _stored(database, _FLOOR))
        self._ceiling = _stored(database, _CEILING)

    @property
    def floor(self) -> float:
        """Seconds since 1970."""
        return self._floor

    def machine_now(self) -> float:
        """What the machine's own clock says, floor or no floor."""
        return self._clock.now()

    @property
    def behind_seconds(self) -> float:
        """How far the machine's clock is behind the floor; 0 when it is not."""
        return max(0.0, self._floor - self._clock.now())

    def now(self) -> float:
        return max(self._clock.now(), self._floor)

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def raise_to(self, seen: float) -> None:
        """Moves the floor up to a time that was signed by the fleet's repository; an earlier one changes nothing.

        Raises:
            StorageError: the floor cannot be stored.
        """
        if seen > self._floor and math.isfinite(seen):
            self._database.set_fact(_FLOOR, float(seen))
            self._floor = float(seen)

    def note_metadata(self, signed_at: float, expires: float) -> None:
        """Takes over when the fleet's newest metadata was signed, and when it ends. Raises like `raise_to`."""
        if expires != self._ceiling and math.isfinite(expires):
            self._database.set_fact(_CEILING, float(expires))
            self._ceiling = float(expires)
        machine = self._clock.now()
        if machine >= max(self._floor, BUILT):
            # This clock may be right, and the aggregator's wrong: one look does not take it far ahead.
            signed_at = min(signed_at, machine + METADATA_STEP_SECONDS)
        self.raise_to(min(signed_at, expires))

    def note_acknowledgement(self, expiry: float) -> None:
        """Takes over the time of a receipt; nothing before the first metadata was verified. Raises like `raise_to`.

        Args:
            expiry: of the receipt's header; 0 for none.
        """
        if expiry:
            farthest = max(self._floor, self._clock.now()) + RECEIPT_STEP_SECONDS
            self.raise_to(min(expiry - RECEIPT_LIFE_SECONDS, self._ceiling, farthest))


def _stored(database: Database, name: str) -> float:
    value = database.fact(name)
    return value if isinstance(value, float) else 0.0
