"""The numbers of a device's own messages: an epoch (one life of the database) and a sequence number within
it.

Law of the file: (device, epoch, seq) never names two plaintexts, through any crash: a block of numbers is
reserved on disk before the first of them is used, and what a crash leaves unused of a block is never used.
Source: docs/protocol.md (replay); a receiver accepts gaps.
"""

from __future__ import annotations

import threading
from typing import Final

from edge_agent.storage import Database

BLOCK: Final = 256


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
        with self._lock:
            if self._epoch != self._database.epoch or self._next > self._reserved:
                self._reserve()
            seq = self._next
            self._next += 1
            return self._epoch, seq

    def _reserve(self) -> None:
        self._epoch, self._next = self._database.reserve_numbers(BLOCK)
        self._reserved = self._next + BLOCK - 1
