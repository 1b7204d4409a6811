"""Where jobs run (train, evaluate, update): one background thread on a device, at once in a simulator.

Laws of the file: one job at a time; a job's error becomes its result and never ends the thread; `done` is
called exactly once for each job. Inference never runs here, so a long job cannot hold up an answer. When no
job has come for a while, what the last ones freed goes back to the system.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from edge_agent.child import end_children
from edge_agent.enrolment.patience import asked_of
from edge_agent.freed_memory import give_back
from edge_agent.ports import JobKind, JobResult
from wire.errors import ShoalError

# With what the transport may take for its last words, less than the ten seconds that a service manager waits.
_STOP_SECONDS = 3.0
# Not between the jobs of rounds that follow each other: a large model's pages would be faulted in for each anew. Once
# more when the upload of what a job made is over on most links.
REST_AFTER_SECONDS: Final = (2.0, 60.0)

Job = tuple[JobKind, bytes, Callable[[], Any], Callable[[JobResult], None]]


def run_job(kind: JobKind, key: bytes, work: Callable[[], Any]) -> JobResult:
    """Runs one job; errors that were raised on purpose, and a machine that is full, become the result."""
    try:
        return JobResult(kind, key, value=work())
    except ShoalError as error:
        return JobResult(kind, key, error=f"{type(error).__name__}: {error}", asked_seconds=asked_of(error))
    except (OSError, MemoryError) as error:
        return JobResult(kind, key, error=f"{type(error).__name__}: {error}")


class ThreadWorker:
    """One daemon thread, started with the first job. What of a job needs the processor most has a low priority
    (`background.py`).

    Args:
        at_rest: called when no job has come for that many seconds, after each of `rest_after_seconds` once.
    """

    def __init__(
        self,
        at_rest: Callable[[], object] = give_back,
        rest_after_seconds: Sequence[float] = REST_AFTER_SECONDS,
    ) -> None:
        self._at_rest = at_rest
        self._rest_after_seconds = rest_after_seconds
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(
        self, kind: JobKind, key: bytes, work: Callable[[], Any], done: Callable[[JobResult], None]
    ) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shoal-worker", daemon=True)
            self._thread.start()
        self._jobs.put((kind, key, work, done))

    def stop(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            end_children()
            self._thread.join(timeout=_STOP_SECONDS)
            self._thread = None

    def _run(self) -> None:
        while (job := self._next()) is not None:
            kind, key, work, done = job
            try:
                result = run_job(kind, key, work)
            except Exception as error:  # noqa: BLE001  the outermost loop of this thread: it reports and goes on
                result = JobResult(kind, key, error=f"unexpected {type(error).__name__}: {error}")
            done(result)
            del job, work, done, result

    def _next(self) -> Job | None:
        for quiet_seconds in self._rest_after_seconds:
            try:
                return self._jobs.get(timeout=quiet_seconds)
            except queue.Empty:
                self._at_rest()
        return self._jobs.get()


class InlineWorker:
    """Runs a job at once on the caller's thread and reports it after a virtual duration (simulator).

    Args:
        later: calls its second argument after that many virtual seconds.
        cost: virtual seconds that a finished job took, from its result.
    """

    def __init__(
        self,
        later: Callable[[float, Callable[[], None]], None],
        cost: Callable[[JobResult], float],
    ) -> None:
        self._later = later
        self._cost = cost

    def submit(
        self, kind: JobKind, key: bytes, work: Callable[[], Any], done: Callable[[JobResult], None]
    ) -> None:
        result = run_job(kind, key, work)
        self._later(self._cost(result), lambda: done(result))

    def stop(self) -> None:
        """Nothing to free: nothing outlives `submit`."""
