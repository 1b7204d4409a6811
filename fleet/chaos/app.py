"""A stock Flower ServerApp in a simulated history: two threads, in step with virtual time.

Laws of the file: the app is nobody's but Flower's and runs in a thread of its own, as in the service; of the two
threads one works at a time, handing over where the app waits, so that a seed's history is always the same; what ends
the process in the app's thread (a crash at a commit, a violation) ends it in the aggregator's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from cloud_server.flower.exchange import Board


class Turns:
    """Whose turn it is: the app's, until it waits for something that is not there yet, or the aggregator's.

    It stands in the place of a board's condition, and of the thread's start.
    """

    def __init__(self) -> None:
        self._app_may = threading.Semaphore(0)
        self._aggregator_may = threading.Semaphore(0)
        self._awaited: Callable[[], object] = lambda: True
        self._thread: threading.Thread | None = None
        self._ended_by: BaseException | None = None

    # ---- the aggregator's thread -------------------------------------------------------------------------------

    def spawn(self, work: Callable[[], None]) -> threading.Thread:
        """Makes the app's thread, which waits for its first turn."""
        self._thread = threading.Thread(target=self._run, args=(work,), name="serverapp", daemon=True)
        self._thread.start()
        return self._thread

    def work(self) -> bool:
        """Lets the app work until it waits again or ends; False when there is nothing for it to do.

        Raises:
            BaseException: what ended the app's thread beside its own errors.
        """
        if self._thread is None or not self._thread.is_alive() or not self._awaited():
            return False
        self._app_may.release()
        self._aggregator_may.acquire()
        ended_by, self._ended_by = self._ended_by, None
        if ended_by is not None:
            raise ended_by
        return True

    # ---- the app's thread --------------------------------------------------------------------------------------

    def _run(self, work: Callable[[], None]) -> None:
        self._app_may.acquire()
        try:
            work()
        except BaseException as error:  # noqa: BLE001  raised again where the process is ended by it
            self._ended_by = error
        self._awaited = lambda: False
        self._aggregator_may.release()

    def __enter__(self) -> bool:
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def wait_for(self, predicate: Callable[[], object], timeout: float | None = None) -> object:
        """Hands over until it is so; no time passes while the app waits but the fleet's."""
        while not (found := predicate()):
            self._awaited = predicate
            self._aggregator_may.release()
            self._app_may.acquire()
        return found

    def notify_all(self) -> None:
        """Whoever waits is asked again at its turn."""


class AppLife:
    """One process's app.

    Attributes:
        stop: ends the app; set once there is one.
    """

    def __init__(self) -> None:
        self.turns = Turns()
        self.stop: Callable[[], None] = lambda: None

    def make_board(self, wake: Callable[[], None]) -> Board:
        """A board whose waits are turns."""
        return Board(wake, self.turns)

    def end(self) -> None:
        """The process is gone, and the app's thread with it."""
        self.stop()
        try:
            while self.turns.work():
                continue
        except BaseException:  # noqa: BLE001  the process has ended already, and nobody hears it
            return
