"""The way to the other party of a run with two servers, and what happens to questions and answers on it.

Laws of the file: the helper itself is the real one and another machine, which no fault of this fleet breaks; a question
may be lost, or its answer, or come late, and is asked again by the aggregator as it would be.
"""

from __future__ import annotations

from collections.abc import Callable

from fleet.chaos.injector import Injector
from fleet.local_helper import LocalHelper
from wire.helper import HelperAnswer, HelperRefusal
from wire.primitives import KemPublicKey

LATEST_SECONDS = 30.0


class FaultyHelper:
    """A helper that is far away; `cloud_server.secure.helper_client.AskedHelper`.

    Args:
        later: plans a call, in virtual seconds.
    """

    def __init__(
        self, inner: LocalHelper, injector: Injector, later: Callable[[float, Callable[[], None]], None]
    ) -> None:
        self._inner = inner
        self._injector = injector
        self._later = later

    @property
    def key(self) -> KemPublicKey:
        """What devices seal their seeds to."""
        return self._inner.key

    def ask(self, question: bytes, total_bytes: int) -> None:
        """Asks, unless a fault strikes on the way."""
        fault = self._injector.visit("helper.ask", "helper")
        if fault is None:
            self._inner.ask(question, total_bytes)
        elif fault.kind == "answer_lost":
            self._inner.ask(question, total_bytes)
            self._inner.take(question)
        elif fault.kind == "late":
            seconds = fault.rng().uniform(0.1, LATEST_SECONDS)
            self._later(seconds, lambda: self._inner.ask(question, total_bytes))

    def take(self, question: bytes) -> HelperAnswer | HelperRefusal | None:
        """What came of a question, once."""
        return self._inner.take(question)
