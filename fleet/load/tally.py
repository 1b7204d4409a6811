"""What the light agents of one process did: plain numbers, a line of JSON a second for whoever started it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec


class Tally(msgspec.Struct, kw_only=True):
    """Counts for all agents of a loop; only its thread writes.

    Attributes:
        online: connected now.
        connects: connections that stood; `disconnects` of them ended.
        attempts_failed: those that never stood.
        heartbeats: handed to a connection that stood.
        made: updates; `uploads` sends of one, of which `uploads_again` were not the first.
        receipts: that ended an update, by verdict.
        releases: agents by the release that they run.
        fetched: releases that were really fetched and verified; `fetches_failed` of those that were tried were not.
        refused: messages that did not open, and publications that were not taken, by kind.
    """

    online: int = 0
    connects: int = 0
    disconnects: int = 0
    attempts_failed: int = 0
    heartbeats: int = 0
    made: int = 0
    uploads: int = 0
    uploads_again: int = 0
    receipts: dict[str, int] = {}
    releases: dict[int, int] = {}
    fetched: int = 0
    fetches_failed: int = 0
    refused: dict[str, int] = {}

    def receipted(self, verdict: str) -> None:
        """A receipt ended an update."""
        self.receipts[verdict] = self.receipts.get(verdict, 0) + 1

    def moved(self, before: int, after: int) -> None:
        """An agent runs another release; 0 is none."""
        self.releases[before] = self.releases.get(before, 0) - 1
        self.releases[after] = self.releases.get(after, 0) + 1

    def failed(self, kind: str) -> None:
        """Something that came could not be used."""
        self.refused[kind] = self.refused.get(kind, 0) + 1


def total(tallies: Iterable[Tally]) -> Tally:
    """The sum over processes."""
    summed = Tally()
    for each in tallies:
        for name in Tally.__struct_fields__:
            mine, theirs = getattr(summed, name), getattr(each, name)
            setattr(
                summed,
                name,
                dict(Counter(mine) + Counter(theirs)) if isinstance(mine, dict) else mine + theirs,
            )
    return summed
