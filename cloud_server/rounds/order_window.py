"""Orders of a large cohort on their way: the next leaves when a device that was asked is heard, as in a window.

Ten thousand orders at once bring ten thousand answers at once: the first waits behind the last, and its device sends it
again. A device that says nothing (it is away, or decides for long) keeps its place in the window for a while only.

Laws of the file: pure; every order leaves once, in the order in which it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cloud_server.db.rounds import OrderRow
from cloud_server.rounds.state import ANSWERS_PER_SECOND, NEVER

ASKED: Final = 512
"""Devices that were asked and are not heard yet."""
SILENT_SECONDS: Final = ASKED / ANSWERS_PER_SECOND
"""After which a device that says nothing leaves its place to the next: its answer may wait in our own queue, and a
slow aggregator must not ask faster than it hears."""


class OrderWindow:
    """What is left to send of one collection."""

    def __init__(self) -> None:
        self._waiting: dict[str, OrderRow] = {}
        self._asked: dict[str, float] = {}

    def __contains__(self, device: str) -> bool:
        """Whether a device's order still waits."""
        return device in self._waiting

    def fill(self, orders: Mapping[str, OrderRow]) -> None:
        """Begins with these orders by device; what was left of others is forgotten."""
        self._waiting, self._asked = dict(reversed(list(orders.items()))), {}

    def heard(self, device: str) -> None:
        """A device answered, whatever it said."""
        self._asked.pop(device, None)

    def take(self, now: float) -> list[OrderRow]:
        """What leaves now.

        Args:
            now: monotonic seconds.
        """
        while self._asked and next(iter(self._asked.values())) + SILENT_SECONDS <= now:
            del self._asked[next(iter(self._asked))]
        leaving = []
        while self._waiting and len(self._asked) < ASKED:
            device, order = self._waiting.popitem()
            self._asked[device] = now
            leaving.append(order)
        return leaving

    def take_all(self) -> list[OrderRow]:
        """The rest, whoever is heard."""
        rest = list(reversed(self._waiting.values()))
        self._waiting = {}
        return rest

    def wait(self, now: float) -> float:
        """Seconds until more can leave though nobody is heard; `NEVER` if nothing is left."""
        if not self._waiting:
            return NEVER
        return max(0.0, next(iter(self._asked.values()), now) + SILENT_SECONDS - now)
