"""Tells the fleet what was signed since it was told last: a release, a rollback, keys that came or went, or the same
anew before it expires.

Law of the file: one rule, whoever signed (the gate, a command in another process, maintenance): the signed timestamp
is another than the one that was announced, or the fleet has grown or shrunk so far that it shall take another time to
come back (`pace.py`). Source: docs/protocol.md, `md/{channel}`.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import structs

from cloud_server.downlink import Downlink
from cloud_server.pace import Hints
from cloud_server.release.publish import DEFAULT_RING, Publisher
from process.clock import Clock
from process.logs import get_logger
from wire.errors import ShoalError

_log = get_logger("cloud.release")

CHECK_SECONDS = 1.0
"""How long a rollback by command may wait for its announcement."""


class Announcer:
    """Announces one ring.

    Args:
        least_agent: the oldest agent that is asked for rounds, which older ones are told; empty for any.
        hints: what the fleet of now is asked to spread over.
    """

    def __init__(
        self,
        publisher: Publisher,
        downlink: Downlink,
        clock: Clock,
        ring: str = DEFAULT_RING,
        *,
        least_agent: str = "",
        hints: Callable[[], Hints] = Hints,
    ) -> None:
        self._publisher = publisher
        self._downlink = downlink
        self._clock = clock
        self._ring = ring
        self._least_agent = least_agent
        self._hints = hints
        self._announced: tuple[bytes, Hints] | None = None
        self._next_check = 0.0
        self.announced_total = 0

    def tick(self) -> float:
        """Announces what is new; returns when it wants to look again (unix seconds)."""
        now = self._clock.now()
        if now >= self._next_check or self._next_check - now > CHECK_SECONDS:
            self._next_check = now + CHECK_SECONDS
            try:
                self._announce_news()
            except ShoalError as error:
                # The store may be back with the next look; a running fleet need not stop for it.
                _log.error("release_not_announced", error=str(error), hint=error.hint)
        return self._next_check

    def _announce_news(self) -> None:
        timestamp, hints = self._publisher.timestamp(), self._hints()
        if (timestamp, hints) == self._announced:
            return
        announcement = self._publisher.announcement(self._ring)
        # Before the first release, too: keys that came or went are news to devices that wait for it.
        self._downlink.announce(
            structs.replace(
                announcement,
                min_agent_version=self._least_agent,
                reconnect_seconds=hints.reconnect_seconds,
                spread_seconds=hints.spread_seconds,
            )
        )
        self.announced_total += 1
        self._announced = announcement.timestamp, hints
