"""How long somebody waits for an answer before he gives up: the loop around a request that may be made again.

Laws of the file: only what another moment may mend is tried again (no way there, a server that is busy); a trust that
does not hold never is; what the server asks for is obeyed within the policy's bound. Source: wire/backoff.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from process.clock import Clock
from process.logs import get_logger
from wire.backoff import Retries
from wire.errors import EnrolmentError, ShoalError, TransportError

_log = get_logger("edge_agent.enrolment.patience")

T = TypeVar("T")


class Patience:
    """Tries until it works, or the time is over.

    Args:
        seconds: in all; 0 tries once.
        pause: waits that many seconds.
    """

    def __init__(
        self, seconds: float, retries: Retries, clock: Clock, *, pause: Callable[[float], None] = time.sleep
    ) -> None:
        self._seconds = seconds
        self._retries = retries
        self._clock = clock
        self._pause = pause

    def keep_trying(self, work: Callable[[], T]) -> T:
        """The result of `work`; raises what it raised last."""
        until = self._clock.monotonic() + self._seconds
        while True:
            try:
                return work()
            except (TransportError, EnrolmentError) as error:
                if not _may_mend(error):
                    raise
                wait = self._retries.failed(asked_seconds=asked_of(error))
                if self._clock.monotonic() + wait > until:
                    raise
                _log.warning("trying_again", seconds=round(wait, 1), reason=str(error))
            self._pause(wait)


def asked_of(error: ShoalError) -> float:
    """How long the other side asked to be left alone; 0 when it did not."""
    asked = error.facts.get("asked_seconds", 0.0)
    return float(asked) if isinstance(asked, int | float) else 0.0


def _may_mend(error: ShoalError) -> bool:
    return isinstance(error, TransportError) or error.facts.get("code") == "busy"
