"""Work that needs the processor and not the interpreter, on a thread that gives way to every other program's.

Laws of the file: nothing runs here that holds the interpreter's lock for long. A thread of low priority that holds it
keeps everybody waiting for as long as the system leaves it without a processor, and an answer with them: that is why
only the train step, which is native code, has a low priority, and not the Python around it.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")

NICENESS: Final = 10
SWITCH_SECONDS: Final = 0.0005
"""How long the interpreter lets one thread run while another waits for it; Python's own 5 ms is ten answers of a small
model, several times in each request."""


class Background:
    """One daemon thread of low priority, started with the first call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[_Ended]]] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None

    def run(self, call: Callable[[], T]) -> T:
        """Runs a call there and waits for it; what it raises is raised here."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="shoal-background", daemon=True)
                self._thread.start()
        ended: queue.SimpleQueue[_Ended] = queue.SimpleQueue()
        self._calls.put((call, ended))
        value, error = ended.get()
        if error is not None:
            raise error
        result: T = value
        return result

    def _serve(self) -> None:
        lower_priority()
        while True:
            call, ended = self._calls.get()
            try:
                ended.put((call(), None))
            except BaseException as error:  # noqa: BLE001  it is raised again, on the thread that waits
                ended.put((None, error))
            del call, ended


_Ended = tuple[Any, BaseException | None]


def lower_priority(process_id: int = 0) -> None:
    """This thread (or a child process) gives way to others. On Linux it touches this thread alone; elsewhere it does
    nothing."""
    if not hasattr(os, "setpriority") or os.uname().sysname != "Linux":
        return
    try:
        target = process_id or threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, target, max(NICENESS, os.getpriority(os.PRIO_PROCESS, target)))
    except OSError:
        return
