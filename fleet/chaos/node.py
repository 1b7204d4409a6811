"""A machine under faults, device or aggregator: it works in turns, dies at any point, and is started again.

Laws of the file: a crash abandons the process as it is, and the next one knows what the disk has; a process that cannot
open what is on its disk ends as one that was killed.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from fleet.chaos.disk import Disk
from fleet.chaos.injector import Crash, Injector
from fleet.chaos.network import ChaosTransport
from fleet.virtual import VirtualTime
from wire.errors import ShoalError, StorageError

NEVER = float("inf")


class NodeClock:
    """Virtual time as one machine's clock shows it."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self.jump_seconds = 0.0

    def now(self) -> float:
        return self._time.now() + self.jump_seconds

    def monotonic(self) -> float:
        return self._time.monotonic()


class Node(ABC):
    """One machine, through all of its lives.

    Args:
        rng: of what is no fault's: how long it is down.
        down_seconds: longest time between a crash and the next start.

    Attributes:
        transport: of the present life; None before the first one.
    """

    disk: Disk
    deadly: ClassVar[tuple[type[ShoalError], ...]] = (StorageError,)
    """What ends the process where it comes up to its outermost loop."""

    def __init__(
        self, name: str, time: VirtualTime, injector: Injector, rng: random.Random, down_seconds: float
    ) -> None:
        self.name = name
        self.clock = NodeClock(time)
        self.transport: ChaosTransport | None = None
        self._time = time
        self._injector = injector
        self._rng = rng
        self._down_seconds = down_seconds

    @property
    @abstractmethod
    def is_up(self) -> bool:
        """Whether a process runs."""

    @property
    @abstractmethod
    def wake_at(self) -> float:
        """When its timers want it, on the monotonic clock."""

    def start(self) -> None:
        """Opens what is on the disk and starts; a fault may end this at once."""
        if self.disk.is_dead:
            # First: whoever closes a database last writes its log into its pages.
            self._forget_disk()
            self.disk.come_back()
        self._guarded(self._open)

    def pump(self) -> None:
        """Handles what waits for it."""
        self._guarded(self._pump)

    def tick(self) -> None:
        """Does what its timers want."""
        self._guarded(self._tick)

    @abstractmethod
    def _open(self) -> None:
        """Begins a life."""

    @abstractmethod
    def _pump(self) -> None: ...

    @abstractmethod
    def _tick(self) -> None: ...

    @abstractmethod
    def _forget_disk(self) -> None:
        """Closes what the ledger reads it by."""

    @abstractmethod
    def _abandon(self) -> None:
        """Lets the process go as it is."""

    def _guarded(self, call: Callable[[], None]) -> None:
        if self.disk.is_dead:
            return
        try:
            call()
        except Crash:
            self._fell()
        except self.deadly as error:
            # The process ends with it.
            self._injector.note(self.name, f"ended: {str(error).replace(str(self.disk.folder), '')}")
            self.disk.die(self._rng)
            self._fell()

    def _fell(self) -> None:
        self._injector.note(self.name, "down")
        self._abandon()
        if self.transport is not None:
            self.transport.drop("the process is gone", for_seconds=NEVER)
        self._time.later(self._rng.uniform(0.1, self._down_seconds), self.start)
