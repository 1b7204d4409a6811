"""The numbers of a device's own messages: an epoch (one life of the database) and a sequence number within
it.

Law of the file: (device, epoch, seq) never names two plaintexts, through any crash: a block of numbers is
reserved on disk before the first of them is used, and what a crash leaves unused of a block is never used. A message
may leave inside of a transaction that fails after it, so numbers are reserved by a commit of their own, ahead of time,
or not at all. Source: docs/protocol.md (replay); a receiver accepts gaps.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Final

from edge_agent.store.storage import Database
from wire.errors import StorageError

BLOCK: Final = 256
LOW: Final = BLOCK // 2
"""With fewer left than these the next block is reserved, so that a transaction finds enough."""


class Sequence:
    """Hands out (epoch, seq), each once. Safe to use from several threads."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._epoch = 0
        self._next = 1
        self._reserved = 0

    def next(self) -> tuple[int, int]:
        """The next pair; seq counts from 1 in every epoch.

        Raises:
            StorageError: a new block cannot be reserved, so nothing may be sent.
        """
        is_inside = self._database.is_in_transaction
        with self._lock:
            is_spent = self._epoch != self._database.epoch or self._next > self._reserved
            if is_spent and is_inside:
                raise StorageError("no number is left, and none can be reserved inside of a transaction")
            if is_spent:
                self._reserve()
            elif self._reserved - self._next < LOW and not is_inside:
                with suppress(StorageError):  # what is left is good
                    self._reserve_more()
            seq = self._next
            self._next += 1
            return self._epoch, seq

    def _reserve(self) -> None:
        self._epoch, self._next = self._database.reserve_numbers(BLOCK)
        self._reserved = self._next + BLOCK - 1

    def _reserve_more(self) -> None:
        epoch, first = self._database.reserve_numbers(BLOCK)
        if (epoch, first) != (self._epoch, self._reserved + 1):
            # Another process has the numbers between, or the database is another.
            self._epoch, self._next = epoch, first
        self._reserved = first + BLOCK - 1
