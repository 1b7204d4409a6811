"""Numbers modulo 2^16 or 2^32: how a parameter's change becomes one, how a mask is added, how a mean comes back.

Laws of the file: pure; integers wrap modulo the ring and are never rounded, so that masks cancel bit for bit. What a
device adds to its numbers before its masks (noise) is added in the ring, between `encode_ring` and `add_mask`.
Source: docs/protocol.md, clauses 13.6 and 13.7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from wire.errors import MessageError, UpdateError
from wire.mask_terms import RingName, RingTerms
from wire.primitives import Keystream

_TILE: Final = 65_536
_NARROW_NOISE: Final = 0.002

RingVector = NDArray[Any]
"""uint16 or uint32 [P]."""


class Randomness(Protocol):
    """Where random bytes come from; `wire.codec.Randomness` by another name would be the same."""

    def bytes(self, length: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Ring:
    """Numbers modulo 2^`bits`, and how a parameter's change becomes one.

    Attributes:
        bits: 16 or 32.
        value_bits: of one device's number; the sum of all of them stays below 2^bits.
        bound: largest absolute change of a parameter.
    """

    bits: int
    value_bits: int
    bound: float

    @property
    def name(self) -> RingName:
        return "ring16" if self.bits == 16 else "ring32"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.bits == 16 else "<u4")

    @property
    def step(self) -> float:
        """What one unit stands for."""
        return 2.0 * self.bound / ((1 << self.value_bits) - 1)


def choose_ring(members: int, params_size: int, bound: float) -> Ring:
    """The ring of a round: 16 bits where that costs nothing that matters, else 32.

    Rounding at random leaves at most √(P / n) · step / 2 (L2 norm) in the mean of n devices; 16 bits are taken when
    that is at most a five-hundredth of `bound`.

    Args:
        members: most devices that may be summed.
        bound: no update is longer (L2 norm), so no parameter changes by more.
    """
    narrow = Ring(16, value_bits_of(16, members), bound)
    noise = (params_size / members) ** 0.5 * narrow.step / 2
    return narrow if noise <= _NARROW_NOISE * bound else Ring(32, value_bits_of(32, members), bound)


def ring_of(terms: RingTerms) -> Ring:
    """The ring that a round's terms name.

    Raises:
        MessageError: (peer) the sum of all members would not fit.
    """
    ring = Ring(16 if terms.ring == "ring16" else 32, terms.value_bits, terms.bound)
    if terms.members * ((1 << ring.value_bits) - 1) >= 1 << ring.bits:
        raise MessageError("the sum of a masked round would overflow its ring", members=terms.members)
    if terms.noise is not None and (ring.bits != 32 or terms.noise.quorum > terms.members):
        raise MessageError("the noise of a masked round does not fit it", members=terms.members)
    return ring


def value_bits_of(bits: int, members: int) -> int:
    """How wide one device's number may be, so that the sum of `members` of them does not wrap."""
    return (((1 << bits) - 1) // members + 1).bit_length() - 1


def encode_ring(vector: NDArray[np.float32], ring: Ring, rng: Randomness) -> RingVector:
    """Numbers of the ring, rounded at random to a neighbour, so that the expected value is the value.

    Args:
        vector: finite float32 [P]; what lies beyond the bound is cut there.
    """
    highest = float((1 << ring.value_bits) - 1)
    encoded = np.empty(len(vector), ring.dtype)
    for start in range(0, len(vector), _TILE):
        tile = vector[start : start + _TILE].astype(np.float64)
        noise = np.frombuffer(rng.bytes(4 * len(tile)), "<u4") * 2.0**-32
        levels = np.floor((tile + ring.bound) / ring.step + noise)
        encoded[start : start + len(tile)] = np.clip(levels, 0.0, highest).astype(ring.dtype)
    return encoded


def decode_mean(total: RingVector, ring: Ring, count: int) -> NDArray[np.float32]:
    """The mean of `count` updates from the sum of their numbers, float32 [P]."""
    mean = np.empty(len(total), np.float32)
    for start in range(0, len(total), _TILE):
        tile = total[start : start + _TILE].astype(np.float64)
        mean[start : start + len(tile)] = tile * (ring.step / count) - ring.bound
    return mean


def ring_vector(payload: bytes, ring: Ring, params_size: int) -> RingVector:
    """Reads the payload of a masked update; every number of the ring is valid.

    Raises:
        UpdateError: (peer) another length.
    """
    if len(payload) != params_size * ring.dtype.itemsize:
        raise UpdateError("masked update has a wrong length", size_bytes=len(payload))
    return np.frombuffer(payload, ring.dtype)


def add_mask(values: RingVector, key: bytes, *, negative: bool = False) -> None:
    """Adds a key's mask to `values` [P] in place, or takes it away; wraps modulo the ring."""
    stream, size = Keystream(key), values.dtype.itemsize
    zeros = memoryview(bytes(min(_TILE, len(values)) * size))
    for start in range(0, len(values), _TILE):
        tile = values[start : start + _TILE]
        mask = np.frombuffer(stream.next(zeros[: len(tile) * size]), values.dtype)
        if negative:
            np.subtract(tile, mask, out=tile)
        else:
            np.add(tile, mask, out=tile)
