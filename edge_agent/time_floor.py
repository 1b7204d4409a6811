"""The latest time that something signed has told this device: a wrong clock must not bring expired metadata
back.

Source: docs/architecture.md, "State folder of a device". The floor moves only forward and only by what was
    verified.
"""

from __future__ import annotations

from edge_agent.storage import Database
from process.clock import Clock


class FlooredClock:
    """A clock that never reads earlier than the floor. Give it to whatever decides whether something has
    expired.
    """

    def __init__(self, clock: Clock, database: Database) -> None:
        self._clock = clock
        self._database = database
        stored = database.fact("time_floor")
        self._floor = stored if isinstance(stored, float) else 0.0

    @property
    def floor(self) -> float:
        """Seconds since 1970."""
        return self._floor

    @property
    def behind_seconds(self) -> float:
        """How far the machine's clock is behind the floor; 0 when it is not."""
        return max(0.0, self._floor - self._clock.now())

    def now(self) -> float:
        return max(self._clock.now(), self._floor)

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def raise_to(self, seen: float) -> None:
        """Moves the floor up to a time that was signed (a release's, a receipt's); an earlier one changes
        nothing.

        Raises:
            StorageError: the floor cannot be stored.
        """
        if seen > self._floor:
            self._database.set_fact("time_floor", float(seen))
            self._floor = float(seen)
