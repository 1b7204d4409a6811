"""The background thread: jobs in order, errors as results, and a rest when none has come for a while."""

from __future__ import annotations

import os
import queue
import threading
from typing import Any

import pytest

from edge_agent.background import NICENESS, Background
from edge_agent.ports import JobResult
from edge_agent.rounds.worker import ThreadWorker
from wire.errors import DataError

PATIENCE_SECONDS = 20.0


def raised(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DataError("no samples"), "DataError: no samples"),
        (MemoryError("full"), "MemoryError: full"),
        (KeyError("fault"), "unexpected KeyError: 'fault'"),
    ],
)
def test_job_that_fails_is_a_result_and_the_next_one_runs(error: Exception, text: str) -> None:
    results: queue.SimpleQueue[JobResult] = queue.SimpleQueue()
    worker = ThreadWorker()
    worker.submit("train", b"a", lambda: raised(error), results.put)
    worker.submit("train", b"b", lambda: 7, results.put)
    first, second = (results.get(timeout=PATIENCE_SECONDS) for _ in range(2))
    worker.stop()
    assert (first.key, first.error) == (b"a", text)
    assert (second.key, second.value) == (b"b", 7)


def test_worker_rests_once_for_each_pause_and_never_between_jobs_that_wait() -> None:
    happened: list[str] = []
    rested: queue.SimpleQueue[None] = queue.SimpleQueue()
    both_wait = threading.Event()

    def rest() -> None:
        happened.append("rest")
        rested.put(None)

    worker = ThreadWorker(rest, (0.01, 0.01))
    worker.submit("train", b"", lambda: both_wait.wait(PATIENCE_SECONDS), lambda _: happened.append("job"))
    worker.submit("train", b"", lambda: None, lambda _: happened.append("job"))
    both_wait.set()
    for _ in range(2):
        rested.get(timeout=PATIENCE_SECONDS)
    assert happened == ["job", "job", "rest", "rest"]
    worker.submit("update", b"", lambda: None, lambda _: happened.append("job"))
    rested.get(timeout=PATIENCE_SECONDS)
    worker.stop()
    assert happened[4:6] == ["job", "rest"]


def test_worker_ends_while_it_would_rest() -> None:
    worker = ThreadWorker(rest_after_seconds=(600.0,))
    done = threading.Event()
    worker.submit("train", b"", lambda: None, lambda _: done.set())
    assert done.wait(PATIENCE_SECONDS)
    worker.stop()
    assert "shoal-worker" not in {thread.name for thread in threading.enumerate()}


def test_background_gives_way_and_its_caller_does_not() -> None:
    background = Background()
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    name, priority = background.run(
        lambda: (threading.current_thread().name, os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    )
    assert (name, priority) == ("shoal-background", max(before, NICENESS))
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_what_fails_in_the_background_is_raised_where_it_was_called() -> None:
    background = Background()
    with pytest.raises(DataError, match="no samples"):
        background.run(lambda: raised(DataError("no samples")))
    assert background.run(lambda: 7) == 7
