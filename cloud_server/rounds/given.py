"""The receipts that were given lately: an update that comes again is answered before it is opened.

A receipt that was lost on its way makes its device offer the same sealed bytes again; opening them costs much more than
the answer does, and of a large one only the last chunk is offered. Laws of the file: only what was committed as
stored is remembered, and only for the device that it was stored of; nothing is decided by it but an answer that was
given before, so that who forges a digest has a true receipt sent to its owner; what is forgotten is opened as
ever, and the books answer. Source: docs/protocol.md, 9.3 and 10.4.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

REMEMBERED: Final = 65_536
"""Receipts; some 300 bytes each. A fleet of 10,000 remembers those of six rounds."""


class GivenReceipts:
    """Update ids by device and transfer digest; the oldest gives way. Used from the aggregator's loop only.

    Args:
        most: how many are remembered.
    """

    def __init__(self, most: int = REMEMBERED) -> None:
        self._most = most
        self._given: OrderedDict[tuple[str, bytes], bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._given)

    def note(self, device: str, transfer: bytes, update_id: bytes) -> None:
        """A receipt says that this transfer of a device is stored."""
        self._given[device, transfer] = update_id
        self._given.move_to_end((device, transfer))
        while len(self._given) > self._most:
            self._given.popitem(last=False)

    def find(self, device: str, transfer: bytes) -> bytes | None:
        """The update that came by this transfer of this device, or None."""
        return self._given.get((device, transfer))
