"""What one agent counted since its start: plain numbers, cheap enough to keep whether or not anybody reads them.

Law of the file: it only counts what the state machine and the answers have done; nothing is decided by it. What has to
survive a restart is not here but in the database (`outbox.totals`).
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Final

from edge_agent import actions as do
from edge_agent import events as on
from edge_agent.device_state import State
from edge_agent.ports import JobKind
from wire.messages import Update

LATENCY_SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Bounds of the histogram of answers: from a small model on a server to a large one on a board."""

_KINDS: Final[dict[str, JobKind]] = {"training": "train", "evaluating": "evaluate", "updating": "update"}


class Tally:
    """The numbers of one agent. `answered` from any thread, `stepped` on the loop's."""

    def __init__(self) -> None:
        self.connections_total = 0
        self.update_sends_total = 0
        self.training_steps_total = 0
        self.swaps: Counter[str] = Counter()
        self.jobs: Counter[tuple[str, ...]] = Counter()
        self.job_seconds: defaultdict[str, float] = defaultdict(float)
        self._job_began = 0.0
        self._away_since: float | None = None
        self._lock = threading.Lock()
        self._latencies = [0] * (len(LATENCY_SECONDS) + 1)
        self._latency_sum = 0.0

    def answered(self, seconds: float) -> None:
        """One window was answered, as its caller waited for it."""
        with self._lock:
            self._latencies[bisect_left(LATENCY_SECONDS, seconds)] += 1
            self._latency_sum += seconds

    def latencies(self) -> tuple[list[int], float]:
        """Answers in each bucket, and the sum of their seconds."""
        with self._lock:
            return list(self._latencies), self._latency_sum

    def away_seconds(self, elapsed: float) -> float:
        """How long there has been no connection; 0 while there is one."""
        return 0.0 if self._away_since is None else max(0.0, elapsed - self._away_since)

    def stepped(
        self, event: on.Event, before: State, after: State, actions: Sequence[do.Action], elapsed: float
    ) -> None:
        """The state machine took an event."""
        if after.connected:
            self._away_since = None
        elif self._away_since is None:
            self._away_since = elapsed
        self.update_sends_total += sum(isinstance(action, do.SendUpdate) for action in actions)
        match event:
            case on.Connected():
                self.connections_total += 1
            case on.RolledBack():
                self.swaps["rollback"] += 1
            case on.JobDone(body=body):
                self._ended(before, "done", elapsed)
                if isinstance(body, Update):
                    self.training_steps_total += int(body.metrics.get("steps", 0))
            case on.DraftDone(steps=steps):
                self._ended(before, "done", elapsed)
                self.training_steps_total += steps
            case on.JobFailed():
                self._ended(before, "failed", elapsed)
            case on.ReleaseInstalled():
                self._ended(before, "done", elapsed)
                self.swaps["release"] += int(event.release_version != before.release_version)
        # One event may end a job and begin the next.
        is_end = isinstance(event, on.JobDone | on.DraftDone | on.JobFailed | on.ReleaseInstalled)
        if after.phase != "idle" and (is_end or before.phase != after.phase):
            self._job_began = elapsed

    def _ended(self, before: State, outcome: str, elapsed: float) -> None:
        kind = _KINDS.get(before.phase)
        if kind is not None:
            self.jobs[kind, outcome] += 1
            self.job_seconds[kind] += max(0.0, elapsed - self._job_began)
