"""One real agent that is asked on a schedule, whatever it is doing, and how long each answer took.

Laws of the file: a request is due at its time, and its wait counts from there, so that one which could not be sent
because an earlier one was late is late, too (Tene's "coordinated omission"); an error, and an answer that never comes,
take for ever. The agent is the product's own command, asked through its own door: lines of JSON.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleet.local_agent import LocalAgent
from models.data.federation import Split

_ANSWER_SECONDS = 20.0
BETWEEN = ""
"""The phase of requests that no figure counts."""


class AskedAgent(LocalAgent):
    """A `LocalAgent` that is asked by phases: nothing before `begin`, then at a fixed rate.

    Attributes:
        phase: under which the requests that become due now are counted.
        releases: that answered, in the order in which they first did after another one.
    """

    def __init__(
        self, device: str, state: Path, settings: Path, token: str, split: Split, *, rate_hz: float
    ) -> None:
        self.phase = BETWEEN
        self.releases: list[int] = []
        self._due: dict[int, tuple[float, str]] = {}
        self._seconds: dict[str, list[float]] = {}
        self._lock = threading.Lock()
        self._asking = threading.Event()
        super().__init__(device, state, settings, token, split, rate_hz=rate_hz)

    @property
    def is_connected(self) -> bool:
        """Whether it says that it has its broker."""
        return bool(self.status().get("connected"))

    def begin(self) -> None:
        """Asks from now on."""
        self._asking.set()

    @contextmanager
    def counted(self, phase: str) -> Iterator[None]:
        """Requests that become due inside belong to a phase."""
        self.phase = phase
        try:
            yield
        finally:
            self.phase = BETWEEN

    def seconds(self, phase: str) -> list[float]:
        """How long the answers of a phase took; infinite where there was an error or none. Waits for the last ones."""
        until = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < until and self._waiting(phase):
            time.sleep(0.05)
        with self._lock:
            missing = sum(name == phase for _, name in self._due.values())
            return [*self._seconds.get(phase, []), *[math.inf] * missing]

    def stop(self) -> int:
        """See `LocalAgent.stop`."""
        self._stopping.set()
        self._asking.set()
        return super().stop()

    def _waiting(self, phase: str) -> bool:
        with self._lock:
            return any(name == phase for _, name in self._due.values())

    def _feed(self) -> None:
        self._asking.wait()
        super()._feed()

    def _is_due(self, number: int, due: float) -> None:
        with self._lock:
            self._due[number] = (due, self.phase)

    def _answered(self, answer: Mapping[str, Any]) -> None:
        now = time.monotonic()
        super()._answered(answer)
        kind, _, number = str(answer["id"]).partition("live-")
        if kind:
            return
        release = int(answer.get("release", 0))
        with self._lock:
            due, phase = self._due.pop(int(number))
            self._seconds.setdefault(phase, []).append(math.inf if "error" in answer else now - due)
        if release and (not self.releases or self.releases[-1] != release):
            self.releases.append(release)
