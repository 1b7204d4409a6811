"""What is dropped is counted, and logged once for each place and reason: a peer must not fill the log."""

from __future__ import annotations

from typing import Final

from process.logs import get_logger

_log = get_logger("edge_agent")

MAX_REMEMBERED: Final = 256
_LEVELS_SHOWN: Final = 5


class Complaints:
    """The book of one agent."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: set[tuple[str, str]] = set()

    def note(self, event: str, reason: str) -> None:
        """Logs what is nobody's fault to count (a broker that is away), once for each reason."""
        if (event, reason) not in self._seen and len(self._seen) < MAX_REMEMBERED:
            self._seen.add((event, reason))
            _log.warning(event, reason=reason)

    def add(self, where: str, reason: str) -> None:
        """Counts one dropped thing.

        Args:
            where: its topic (shown up to the kind of message), or another word.
        """
        self.total += 1
        place = "/".join(where.split("/")[:_LEVELS_SHOWN])
        if (place, reason) not in self._seen and len(self._seen) < MAX_REMEMBERED:
            self._seen.add((place, reason))
            _log.warning("message_dropped", topic=place, reason=reason)
