"""The noise and the step grid that both sides of the `dithered` codec compute alike.

Subtractive dither: the sender adds noise before it rounds, the receiver takes the same noise off again, and
the error is uniform and independent of the value. Laws of the file: pure; the same numbers on every
machine, and from any place of the stream. Sources: SplitMix64 (Steele et al. 2014), docs/protocol.md,
clause 8.
"""

from __future__ import annotations

from typing import Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from wire.errors import UpdateError

Float32: TypeAlias = NDArray[np.float32]

STEPS: Final[Float32] = np.concatenate(([0.0], 2.0 ** ((np.arange(1, 256) - 191) / 8))).astype(np.float32)
"""The step of each scale code: none for 0, then 2^-23.75 … 2^8 by eighths of an octave."""


def step_codes(steps: Float32) -> NDArray[np.uint8]:
    """The codes of the smallest steps of the grid that are at least `steps`; 0 for a block of zeros.

    Raises:
        UpdateError: (us) a step above the grid (256): such an update is no update.
    """
    if steps.max() > STEPS[-1]:
        raise UpdateError("update is too large for its codec", largest=float(steps.max()))
    codes = np.searchsorted(STEPS[1:], steps).astype(np.uint8) + np.uint8(1)
    return cast(NDArray[np.uint8], np.where(steps > 0, codes, 0).astype(np.uint8))


def dither(seed: int, start: int, count: int) -> Float32:
    """Uniform noise in (−½, ½) for the values from `start` (a multiple of 4): 16 bits each of SplitMix64's
    stream.

    Counted, not drawn, so that it is the same on every machine and can start anywhere.
    """
    return _noise(seed, np.arange(start // 4 + 1, (start + count + 3) // 4 + 1, dtype=np.uint64))[:count]


def dither_blocks(seed: int, blocks: NDArray[np.int64], size: int) -> Float32:
    """The same noise for single blocks of `size` values (a multiple of 4), float32 [len(blocks), size]."""
    starts = blocks.astype(np.uint64) * np.uint64(size // 4)
    words: NDArray[np.uint64] = np.add.outer(starts, np.arange(1, size // 4 + 1, dtype=np.uint64))
    return _noise(seed, words.reshape(-1)).reshape(-1, size)


def _noise(seed: int, words: NDArray[np.uint64]) -> Float32:
    """Four values for each place in the stream, which is overwritten."""
    words *= np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64(seed)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    noise = words.astype("<u8", copy=False).view("<u2").astype(np.float32)
    noise -= np.float32(32767.5)
    noise *= np.float32(1 / 65536)
    return noise
