"""The watch over a new release: what it answers next to the one before it, on windows that this device was asked about.

The gate of the aggregator judged the release by numbers of many devices; what is left to see is what this device alone
can show: a processor on which the model is slow or wrong, a sensor that it was not made for. Laws of the file: nothing
here holds up an answer (windows are copied when they were answered, and shadowed later, on another thread, within a
budget); the predecessor's word counts only where it was sure, so that a model that was never trained cannot hold back
the first one that was. Source: docs/architecture.md, "Model swap".
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edge_agent.ports import Floats
from edge_agent.settings import ReleaseSettings
from process.clock import Clock
from wire.errors import ModelError

PENDING_WINDOWS: Final = 32
PENDING_BYTES: Final = 2**20
KEPT: Final = 512
BUDGET_SECONDS: Final = 0.25
"""Of one look: a twentieth of the time between two."""
SURE: Final = 0.8
LEAST_SLOWER_SECONDS: Final = 0.002
"""A model that takes a tenth of a millisecond may take four without anybody noticing."""
ERROR_GROWTH: Final = 4.0


@dataclass(frozen=True, slots=True)
class Said:
    """What one model said about a window, in how long. `score`: the confidence, or the reconstruction error."""

    label: int | None
    score: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Shadowed:
    """One window, answered by the new model and by the one before."""

    new: Said
    before: Said


def judge(seen: Sequence[Shadowed], limits: ReleaseSettings) -> str:
    """Why the new model should go, or empty; with fewer than `watch_windows` windows nothing is said."""
    if len(seen) < limits.watch_windows:
        return ""
    slower = _slower(seen, limits.watch_slowdown)
    if slower:
        return slower
    if seen[0].new.label is None:
        return _worse_reconstruction(seen)
    sure = [each for each in seen if each.before.score >= SURE]
    return _strange(sure, limits) if len(sure) >= limits.watch_windows else ""


def _slower(seen: Sequence[Shadowed], slowdown: float) -> str:
    new = float(np.median([each.new.seconds for each in seen]))
    before = float(np.median([each.before.seconds for each in seen]))
    if new <= slowdown * before or new - before < LEAST_SLOWER_SECONDS:
        return ""
    return f"an answer takes {new * 1e3:.1f} ms, and took {before * 1e3:.1f} before"


def _worse_reconstruction(seen: Sequence[Shadowed]) -> str:
    new = float(np.median([each.new.score for each in seen]))
    before = float(np.median([each.before.score for each in seen]))
    if new <= ERROR_GROWTH * before:
        return ""
    return f"its reconstruction errors are {new:.3g}, and were {before:.3g}"


def _strange(sure: Sequence[Shadowed], limits: ReleaseSettings) -> str:
    """Of windows that the model before was sure of."""
    count = len(sure)
    differing = sum(each.new.label != each.before.label for each in sure) / count
    if differing > limits.watch_disagreement:
        return f"it differs on {differing:.0%} of {count} windows that the release before was sure of"
    moved = _moved(sure)
    if moved > limits.watch_shift:
        return f"its answers moved by {moved:.0%} of {count} windows that the release before was sure of"
    drop = sum(each.before.score - each.new.score for each in sure) / count
    if drop > limits.watch_confidence_drop:
        return f"its confidence is {drop:.2f} lower on {count} windows that the release before was sure of"
    return ""


def _moved(sure: Sequence[Shadowed]) -> float:
    """Total variation between the two distributions of answers, 0 to 1."""
    new = Counter(each.new.label for each in sure)
    before = Counter(each.before.label for each in sure)
    return sum(abs(new[label] - before[label]) for label in {*new, *before}) / (2 * len(sure))


class Watch:
    """The watch over one release. `offer` from any thread, `look` on one.

    Args:
        new, before: answer one window, float32 [1, …]; both raise `ModelError`.
    """

    def __init__(
        self,
        version: int,
        new: Callable[[Floats], tuple[int | None, float]],
        before: Callable[[Floats], tuple[int | None, float]],
        clock: Clock,
    ) -> None:
        self.version = version
        self._new = new
        self._before = before
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: deque[Floats] = deque()
        self._pending_bytes = 0
        self.seen: deque[Shadowed] = deque(maxlen=KEPT)

    def offer(self, window: Floats) -> None:
        """A window that the new release just answered; it is copied where there is room."""
        with self._lock:
            is_full = len(self._pending) >= PENDING_WINDOWS or self._pending_bytes >= PENDING_BYTES
            if is_full:
                return
            self._pending.append(window.copy())
            self._pending_bytes += window.nbytes

    def look(self, limits: ReleaseSettings) -> str:
        """Shadows what waits, within the budget; returns why the release should go, or empty."""
        until = self._clock.monotonic() + BUDGET_SECONDS
        while (window := self._take()) is not None:
            try:
                # In turns, so that neither of them always finds the other's window in the caches.
                is_first = len(self.seen) % 2 == 0
                first, second = (self._new, self._before) if is_first else (self._before, self._new)
                one, other = self._ask(first, window), self._ask(second, window)
            except ModelError:
                # The new one's failures are told by whoever asked it; the old one's say nothing of the new.
                continue
            self.seen.append(Shadowed(one, other) if is_first else Shadowed(other, one))
            if self._clock.monotonic() >= until:
                break
        return judge(tuple(self.seen), limits)

    def _take(self) -> Floats | None:
        with self._lock:
            if not self._pending:
                return None
            window = self._pending.popleft()
            self._pending_bytes -= window.nbytes
            return window

    def _ask(self, model: Callable[[Floats], tuple[int | None, float]], window: Floats) -> Said:
        started = self._clock.monotonic()
        label, score = model(window)
        return Said(label, score, max(0.0, self._clock.monotonic() - started))
