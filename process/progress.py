"""A progress bar on a terminal, and silence in a pipe; the base install has no package for it.

Laws: it writes to stderr only (stdout is data); it never writes when the stream is no terminal; at most ten
times a second.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

_REDRAW_SECONDS = 0.1
_BAR_CHARACTERS = 24
_CLEAR_LINE = "\r\x1b[2K"

_active: Progress | None = None
_active_lock = threading.RLock()


class Progress:
    """One line: label, bar, count, remaining time, note. A context manager; the line stays when it ends.

    Args:
        label: what is being done ("rounds").
        total: steps in all, or None when nobody knows.
        stream: stderr by default.
        monotonic: seconds; for the remaining time and against drawing too often.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        stream: TextIO | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._label = label
        self._total = total
        self._stream = stream if stream is not None else sys.stderr
        self._monotonic = monotonic
        self._started = monotonic()
        self._drawn = float("-inf")
        self._done = 0
        self._note = ""
        self._shows = is_terminal(self._stream)

    @property
    def done(self) -> int:
        """Steps made."""
        return self._done

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Makes steps and, with `note`, says something at the end of the line."""
        with _active_lock:
            self._done += steps
            if note is not None:
                self._note = note
            now = self._monotonic()
            if self._shows and now - self._drawn >= _REDRAW_SECONDS:
                self._draw(now)

    def __enter__(self) -> Progress:
        global _active
        with _active_lock:
            _active = self
            if self._shows:
                self._draw(self._monotonic())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        with _active_lock:
            if self._shows:
                self._draw(self._monotonic())
                self._stream.write("\n")
                self._stream.flush()
            if _active is self:
                _active = None

    def clear(self) -> None:
        """Takes the line off the screen until it is drawn again."""
        if self._shows:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()

    def redraw(self) -> None:
        """Draws the line now."""
        if self._shows:
            self._draw(self._monotonic())

    def _draw(self, now: float) -> None:
        self._drawn = now
        width = shutil.get_terminal_size((80, 24)).columns
        self._stream.write(_CLEAR_LINE + self._line(now)[: max(10, width - 1)])
        self._stream.flush()

    def _line(self, now: float) -> str:
        parts = [self._label]
        if self._total:
            share = min(1.0, self._done / self._total)
            filled = int(share * _BAR_CHARACTERS)
            parts += [f"[{'#' * filled}{'.' * (_BAR_CHARACTERS - filled)}]", f"{self._done}/{self._total}"]
            if 0 < self._done < self._total:
                parts.append(f"{_clock_time((now - self._started) * (1 / share - 1))} left")
        else:
            parts.append(str(self._done))
        if self._total is None or self._done >= self._total:
            parts.append(_clock_time(now - self._started))
        return "  ".join([*parts, self._note] if self._note else parts)


@contextmanager
def aside(stream: TextIO) -> Iterator[None]:
    """Lets something else write whole lines to the stream that a bar is drawn on."""
    with _active_lock:
        bar = _active if _active is not None and is_terminal(stream) else None
        if bar is not None:
            bar.clear()
        try:
            yield
        finally:
            if bar is not None:
                bar.redraw()


def is_terminal(stream: TextIO) -> bool:
    """Whether a line can be drawn over on this stream."""
    return not stream.closed and stream.isatty() and os.environ.get("TERM") != "dumb"


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
