"""How a plaintext is cut into AEAD records, and padded to a size class so that its length says little.

Laws of the file: pure arithmetic on lengths and bytes. Sources: Padmé (Nikitin et al., PETS 2019), ISO/IEC
7816-4 padding, docs/protocol.md, clause 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from wire.errors import EnvelopeError
from wire.primitives import TAG_BYTES

RECORD_BYTES: Final = 98_304
"""Plaintext bytes of a record: with its tag and the head of a small message it fits one 120 KiB chunk."""
MIN_RECORD_BYTES: Final = 1024
MAX_RECORD_BYTES: Final = 122_864
_MIN_CLASS_BYTES: Final = 256
_PAD_MARK: Final = 0x80


@dataclass(frozen=True, slots=True)
class Records:
    """How a plaintext is cut; an empty one is a single empty record."""

    plaintext_bytes: int
    record_bytes: int

    @property
    def count(self) -> int:
        return max(1, -(-self.plaintext_bytes // self.record_bytes))

    @property
    def ciphertext_bytes(self) -> int:
        return self.plaintext_bytes + self.count * TAG_BYTES

    def is_last(self, index: int) -> bool:
        return index == self.count - 1

    def plaintext_slice(self, index: int) -> slice:
        start = index * self.record_bytes
        return slice(start, min(start + self.record_bytes, self.plaintext_bytes))

    def plaintext_piece(self, index: int, body: memoryview, padding: bytes) -> bytes | memoryview:
        """Record `index` of `body || padding`; nothing is copied but where the two meet."""
        cut = self.plaintext_slice(index)
        if cut.stop <= len(body):
            return body[cut]
        return b"".join((body[cut], padding[max(0, cut.start - len(body)) : cut.stop - len(body)]))

    def ciphertext_slice(self, index: int) -> slice:
        start = index * (self.record_bytes + TAG_BYTES)
        return slice(start, min(start + self.record_bytes + TAG_BYTES, self.ciphertext_bytes))


def size_class(size_bytes: int) -> int:
    """The padded size of `size_bytes`: at most a sixteenth above it (Padmé), never below 256."""
    if size_bytes <= _MIN_CLASS_BYTES:
        return _MIN_CLASS_BYTES
    exponent = size_bytes.bit_length() - 1
    low_bits = exponent - exponent.bit_length()
    return (size_bytes + (1 << low_bits) - 1) >> low_bits << low_bits


def padding_to_class(body_bytes: int) -> bytes:
    """ISO/IEC 7816-4 padding of a body up to its size class: a mark, then zeros."""
    return bytes((_PAD_MARK,)).ljust(size_class(body_bytes + 1) - body_bytes, b"\0")


def unpadded_length(plaintext: memoryview) -> int:
    """How much of a padded plaintext is body.

    Raises:
        EnvelopeError: (peer) no mark, or not padded to exactly its size class.
    """
    # Padding is at most a sixteenth of a long plaintext, so its mark is near the end.
    near = max(0, len(plaintext) - len(plaintext) // 16 - _MIN_CLASS_BYTES)
    tail = bytes(plaintext[near:]).rstrip(b"\0")
    marked = near + len(tail)
    if not tail or tail[-1] != _PAD_MARK or size_class(marked) != len(plaintext):
        raise EnvelopeError("message does not open", reason="padding")
    return marked - 1
