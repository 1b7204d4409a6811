"""The window that lets every (epoch, seq) of one sender and type in once, in almost any order.

Laws of the file: pure; a window is three numbers that live in one database row and move in the transaction
that stores the message. `behind` is not forged: the durable record of the message's own id decides whether it
is a duplicate or late. Sources: OSCORE (RFC 8613 §7.4), IPsec's anti-replay window (RFC 4303 §3.4.3),
docs/protocol.md, clause 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from wire.errors import ReplayError, StorageError

WINDOW_BITS: Final = 64
_LIMIT: Final = 2**63
_MASK: Final = 2**WINDOW_BITS - 1


@dataclass(frozen=True, slots=True)
class Window:
    """What was seen from one sender.

    Attributes:
        epoch: the newest epoch seen.
        highest: the highest seq seen in that epoch, −1 before the first.
        bitmap: bit i is set if `highest − i` was seen.
    """

    epoch: int = 0
    highest: int = -1
    bitmap: int = 0

    def accept(self, epoch: int, seq: int) -> Window:
        """Returns the window after (epoch, seq) was let in.

        Raises:
            ReplayError: (peer) `reason` is `seen` (a replay or a repeated delivery) or `behind` (an older
                epoch, or a seq more than 63 below the highest: it may be new or old, the window cannot tell).
        """
        if not (0 <= epoch < _LIMIT and 0 <= seq < _LIMIT):
            raise ReplayError("epoch or seq is out of bounds", reason="behind", epoch=epoch, seq=seq)
        if epoch < self.epoch:
            raise ReplayError("message of an older epoch", reason="behind", epoch=epoch, seq=seq)
        if epoch > self.epoch or self.highest < 0:
            return Window(epoch, seq, 1)
        age = self.highest - seq
        if age >= WINDOW_BITS:
            raise ReplayError("message behind the window", reason="behind", epoch=epoch, seq=seq)
        if age < 0:
            moved = self.bitmap << min(-age, WINDOW_BITS) & _MASK
            return Window(epoch, seq, moved | 1)
        if self.bitmap >> age & 1:
            raise ReplayError("message was seen before", reason="seen", epoch=epoch, seq=seq)
        return Window(epoch, self.highest, self.bitmap | 1 << age)

    def to_row(self) -> tuple[int, int, int]:
        """(epoch, highest, bitmap) as three signed 64-bit numbers, which any database holds."""
        signed = self.bitmap - 2**WINDOW_BITS if self.bitmap >= _LIMIT else self.bitmap
        return self.epoch, self.highest, signed

    @classmethod
    def from_row(cls, epoch: int, highest: int, bitmap: int) -> Window:
        """Reads `to_row`.

        Raises:
            StorageError: (disk) numbers that no window can hold.
        """
        fits = 0 <= epoch < _LIMIT and -1 <= highest < _LIMIT and -_LIMIT <= bitmap < _LIMIT
        seen = bitmap & _MASK
        # The highest seq is always marked seen, and no bit stands for a seq below 0.
        if not fits or (seen & 1) != (highest >= 0) or seen >> min(highest + 1, WINDOW_BITS):
            raise StorageError("damaged replay window", epoch=epoch, highest=highest, bitmap=bitmap)
        return cls(epoch, highest, seen)
