"""Labels that arrive after the answer: the windows that were answered lately, held in memory until
someone says what they were.

Laws of the file: bounded in number and bytes; nothing is written to disk before it has a label (an
unlabelled stream at 50 Hz would wear a flash card out); nothing leaves the device.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass

from edge_agent.ports import Floats


@dataclass(frozen=True, slots=True)
class Answered:
    """A window [*input_shape] and what the model said about it (None for an anomaly task)."""

    window: Floats
    label: int | None


class RecentWindows:
    """The last windows that were answered, by sample id. Safe to use from several threads."""

    def __init__(self, *, max_windows: int, max_bytes: int) -> None:
        self._max_windows = max_windows
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._bytes = 0
        self._answered: OrderedDict[str, Answered] = OrderedDict()

    def keep(self, sample_id: str, answered: Answered) -> None:
        """Remembers a window, which is not copied: the caller must not change it."""
        with self._lock:
            before = self._answered.pop(sample_id, None)
            if before is not None:
                self._bytes -= before.window.nbytes
            self._answered[sample_id] = answered
            self._bytes += answered.window.nbytes
            while len(self._answered) > self._max_windows or self._bytes > self._max_bytes:
                _, dropped = self._answered.popitem(last=False)
                self._bytes -= dropped.window.nbytes

    def take(self, sample_id: str) -> Answered | None:
        """Gives a window back and forgets it; None when it is unknown or too old."""
        with self._lock:
            answered = self._answered.pop(sample_id, None)
            if answered is not None:
                self._bytes -= answered.window.nbytes
            return answered


def belongs_to_validation(sample_id: str, share: float) -> bool:
    """Whether a sample is held out: decided by its id alone, so that it never moves between the splits."""
    return zlib.crc32(sample_id.encode()) < share * 2**32
