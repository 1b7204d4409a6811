"""Decoded updates between their receipt and their fold, so that an update that was just screened is not decoded twice.

Laws of the file: a convenience and never the truth (what is folded are the committed ids, whose bytes are on the disk:
without this, after a restart or beyond the budget the same numbers are decoded from them); memory stays inside the
budget, however large the cohort; each update is given out once, so that whoever has it may write to it. Source:
docs/architecture.md, law 3.
"""

from __future__ import annotations

from typing import Final

from cloud_server.screening import Screened

KEPT_BYTES: Final = 128 * 1024 * 1024


class KeptUpdates:
    """Screened updates by update id, the first ones that fit."""

    def __init__(self, limit_bytes: int = KEPT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._kept: dict[bytes, Screened] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, update_id: bytes, screened: Screened) -> None:
        """Keeps an update whose row is committed, unless there is no room or it is kept already."""
        size = _size_bytes(screened)
        if update_id not in self._kept and self._bytes + size <= self._limit_bytes:
            self._kept[update_id] = screened
            self._bytes += size

    def take(self, update_id: bytes) -> Screened | None:
        """Gives an update out and forgets it; None where it is not kept."""
        screened = self._kept.pop(update_id, None)
        if screened is not None:
            self._bytes -= _size_bytes(screened)
        return screened

    def clear(self) -> None:
        """Forgets what nobody took: its round failed, or its fold needed it only once."""
        self._kept.clear()
        self._bytes = 0


def _size_bytes(screened: Screened) -> int:
    return screened.update.nbytes + screened.buffers.nbytes
