"""Exact samples of the discrete Gaussian from a cryptographic stream: differential privacy's noise, on either side.

P(x) ∝ exp(−x² / 2σ²) over the integers. Laws of the file: pure; integers only, for the low bits of floating-point
noise tell what it should hide (Mironov, "On significance of the least significant bits for differential privacy",
2012); the same seed gives the same samples on every machine; who does not know the seed can predict nothing. Not
hidden: how long a draw took. Source: Canonne, Kamath, Steinke, "The discrete Gaussian for differential privacy"
(2020), algorithms 1 to 3, with integer σ and t = σ, over whole arrays.
"""

from __future__ import annotations

import hashlib
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from wire.errors import ConfigurationError

Integers: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]

SEED_BYTES: Final = 32
MAX_SIGMA: Final = 2**24
"""Up to here every product of the sampler fits into 64 bits."""

_BLOCK_BYTES: Final = 2**16
_BATCH: Final = 2**17
# A candidate this many σ out is refused without a draw: it would be accepted with a probability below exp(-4900).
_FARTHEST: Final = 100


class WordStream:
    """Uniform 64-bit words: SHAKE-256 over a seed, a label and a counter.

    Args:
        seed: 32 secret bytes from a good source.
        label: what the words are for; another label gives independent words.

    Raises:
        ConfigurationError: (us) a seed of another length.
    """

    def __init__(self, seed: bytes, label: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise ConfigurationError(f"a seed of noise has {SEED_BYTES} bytes, not {len(seed)}")
        self._prefix = b"shoal noise\0" + len(label).to_bytes(4, "big") + label + seed
        self._counter = 0
        self._rest: Words = np.zeros(0, np.uint64)

    def take(self, count: int) -> Words:
        """The next words, uint64 [count]."""
        parts, have = [self._rest], len(self._rest)
        while have < count:
            parts.append(self._block())
            have += len(parts[-1])
        words = np.concatenate(parts)
        self._rest = words[count:]
        return words[:count].copy()

    def below(self, bounds: Words) -> Words:
        """For each bound (at least 1) a uniform integer from 0 to bound − 1, without any bias."""
        # 2**64 mod bound: words from here up are a whole number of times `bound`.
        least = (~bounds + np.uint64(1)) % bounds
        words = self.take(len(bounds))
        again = np.flatnonzero(words < least)
        while again.size:
            words[again] = self.take(again.size)
            again = again[words[again] < least[again]]
        return words % bounds

    def _block(self) -> Words:
        data = hashlib.shake_256(self._prefix + self._counter.to_bytes(8, "big")).digest(_BLOCK_BYTES)
        self._counter += 1
        return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)


def discrete_gaussian(stream: WordStream, sigma: int, count: int) -> Integers:
    """Independent samples, int64 [count]; the variance is σ² to within exp(−σ²).

    Args:
        sigma: from 1 to `MAX_SIGMA`.

    Raises:
        ConfigurationError: (us) a sigma out of bounds.
    """
    if not 1 <= sigma <= MAX_SIGMA:
        raise ConfigurationError(f"sigma is {sigma}", hint=f"use a whole number from 1 to {MAX_SIGMA}")
    samples = np.empty(count, np.int64)
    done = 0
    while done < count:
        # Somewhat under half of the candidates of a batch become samples.
        found = _accepted(stream, sigma, min(_BATCH, 3 * (count - done) + 16))[: count - done]
        samples[done : done + len(found)] = found
        done += len(found)
    return samples


def discrete_laplace(stream: WordStream, scale: int, candidates: int) -> Integers:
    """At most so many samples of P(x) ∝ exp(−|x| / scale), int64: each candidate gives one or none."""
    bounds = np.full(candidates, scale, np.uint64)
    low = stream.below(bounds)
    low = low[_happens(stream, low, bounds)]
    magnitudes = low.astype(np.int64) + scale * _whole_decays(stream, len(low))
    is_negative = (stream.take(len(low)) & np.uint64(1)).astype(bool)
    signed = np.where(is_negative, -magnitudes, magnitudes)
    # Zero would come with both signs.
    kept: Integers = signed[~(is_negative & (magnitudes == 0))]
    return kept


def _accepted(stream: WordStream, sigma: int, candidates: int) -> Integers:
    """Those of a batch of discrete Laplace samples that the Gaussian keeps."""
    drawn = discrete_laplace(stream, sigma, candidates)
    drawn = drawn[np.abs(drawn) < _FARTHEST * sigma]
    off = (np.abs(drawn) - sigma).astype(np.int64)
    exponents = (off * off).astype(np.uint64)
    return drawn[_decays(stream, exponents, np.full(len(drawn), 2 * sigma * sigma, np.uint64))]


def _decays(stream: WordStream, numerators: Words, denominators: Words) -> NDArray[np.bool_]:
    """Each true with probability exp(−numerator / denominator), whatever the fraction."""
    left = numerators // denominators
    is_true = np.ones(len(left), np.bool_)
    open_ones = np.flatnonzero(left)
    while open_ones.size:
        ones = np.ones(open_ones.size, np.uint64)
        survives = _happens(stream, ones, ones)
        is_true[open_ones[~survives]] = False
        open_ones = open_ones[survives]
        left[open_ones] -= np.uint64(1)
        open_ones = open_ones[left[open_ones] > 0]
    rest = np.flatnonzero(is_true)
    is_true[rest] = _happens(stream, numerators[rest] % denominators[rest], denominators[rest])
    return is_true


def _happens(stream: WordStream, numerators: Words, denominators: Words) -> NDArray[np.bool_]:
    """Each true with probability exp(−numerator / denominator), the fraction at most 1 (algorithm 1)."""
    is_odd = np.ones(len(numerators), np.bool_)
    running = np.arange(len(numerators))
    factor = 1
    while running.size:
        hit = stream.below(denominators[running] * np.uint64(factor)) < numerators[running]
        running = running[hit]
        is_odd[running] = ~is_odd[running]
        factor += 1
    return is_odd


def _whole_decays(stream: WordStream, count: int) -> Integers:
    """How often in a row an event of probability exp(−1) happens, int64 [count]."""
    times = np.zeros(count, np.int64)
    running = np.arange(count)
    while running.size:
        ones = np.ones(running.size, np.uint64)
        running = running[_happens(stream, ones, ones)]
        times[running] += 1
    return times
