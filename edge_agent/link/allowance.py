"""What a release check may cost, in its own process: it stops where the budget or the window ends, and writes down what
it has cost, so that the agent counts it whatever becomes of the check.

Laws of the file: the note is written before the next quarter of a megabyte is asked for; who reads it takes it away;
a download that was stopped goes on where it was when the link opens again (`tuf_client.py`). Source:
docs/how-to/links.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from edge_agent.vitals.status import replace_file
from process.clock import Clock
from wire.errors import TransportError
from wire.traffic import TrafficMeter

NOTE_NAME: Final = "link_bytes"
_NOTE_EVERY_BYTES: Final = 256 * 1024
_MAX_NOTE_BYTES: Final = 32


class Allowance:
    """Of one check.

    Args:
        note: the file that the cost is written to.
        bytes_left: most that it may cost; None for no limit.
        until: unix seconds at which it must end; 0 for never.
        meter: counts the check's connections.
    """

    def __init__(
        self,
        note: Path,
        meter: TrafficMeter,
        clock: Clock,
        *,
        bytes_left: int | None = None,
        until: float = 0.0,
    ) -> None:
        self._note = note
        self._meter = meter
        self._clock = clock
        self._bytes_left = bytes_left
        self._until = until
        self._before = read_note(note)  # of a check whose agent died with it
        self._noted = -1

    def check(self) -> None:
        """Notes what it cost so far.

        Raises:
            TransportError: no more may be fetched (`is_final`).
        """
        cost = self._cost()
        if cost - self._noted >= _NOTE_EVERY_BYTES or self._noted < 0:
            self._write(cost)
        if self._bytes_left is not None and cost >= self._bytes_left:
            raise TransportError("the link's budget is spent: the download waits", is_final=True)
        if self._until and self._clock.now() >= self._until:
            raise TransportError("the link's window is over: the download waits", is_final=True)

    def close(self) -> None:
        """Notes the whole cost."""
        self._write(self._cost())

    def _cost(self) -> int:
        total = self._meter.total()
        return total.total_bytes if total is not None else 0

    def _write(self, cost: int) -> None:
        self._noted = cost
        replace_file(self._note, str(self._before + cost))


def read_note(note: Path) -> int:
    """What a check wrote down, and takes it away; 0 for nothing that can be read."""
    try:
        with note.open("rb") as file:
            text = file.read(_MAX_NOTE_BYTES)
        note.unlink()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0
