"""The integers that updates are rounded to under differential privacy, and a device's own noise on them.

Laws of the file: pure; a rounded update is never longer than the radius, counted in integers, whatever a machine's
rounding does, because the guarantee stands on it; noise is added in integers too (Mironov 2012) and from 32 secret
bytes, and what leaves `add_noise` is a number of the ring: noise and numbers wrap alike, which costs the sum nothing
and the guarantee nothing. Source: docs/protocol.md, clause 13.13; Kairouz, Liu, Steinke, "The distributed discrete
Gaussian mechanism for federated learning with secure aggregation" (2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wire.discrete_gaussian import WordStream, discrete_gaussian
from wire.errors import ConfigurationError
from wire.mask_terms import NoiseTerms
from wire.norm import l2_norm
from wire.ring import RingVector

_LABEL = b"device noise"


@dataclass(frozen=True, slots=True)
class Lattice:
    """The integers that clipped updates are rounded to.

    Attributes:
        step: what one of them stands for.
        radius: no rounded update is longer than this (L2), in steps.
    """

    step: float
    radius: Fraction

    @classmethod
    def of(cls, clipping_norm: float, radius: Fraction, size: int) -> Self:
        """The lattice of a clip that becomes a radius.

        Args:
            size: P; rounding to the nearest lengthens an update by at most √P / 2 steps, which the step makes room for.

        Raises:
            ConfigurationError: (operator) so much noise on so many parameters that nothing of an update is left.
        """
        room = float(radius) - math.sqrt(size) / 2 - 1
        if room < 1:
            raise ConfigurationError(
                f"the noise multiplier is too much for {size} parameters",
                hint="lower privacy.noise_multiplier",
                size=size,
            )
        return cls(clipping_norm / room, radius)

    def rounded(self, update: NDArray[np.float32], clipping_norm: float) -> NDArray[np.int64]:
        """The update, float32 [P], clipped and rounded: int64 [P], never longer than the radius."""
        norm = l2_norm(update)
        scale = min(1.0, clipping_norm / norm) if norm > 0 else 0.0
        limit = math.floor(self.radius**2)
        while True:
            found = np.rint(update.astype(np.float64) * (scale / self.step)).astype(np.int64)
            if int(np.dot(found, found)) <= limit:
                return found
            # Only a rounding of `norm` or `step` comes here; the bound itself is not negotiable.
            scale *= 1.0 - 2.0**-20


def add_noise(update: NDArray[np.float32], terms: NoiseTerms, seed: bytes) -> RingVector:
    """An update as a device masks it: clipped, rounded, with discrete Gaussian noise, modulo 2^32.

    Args:
        update: finite float32 [P].
        seed: 32 unpredictable bytes, for this update only.

    Returns:
        uint32 [P].

    Raises:
        ConfigurationError: (peer) a radius that leaves nothing of an update of this size.
    """
    lattice = Lattice.of(terms.clipping_norm, Fraction(terms.radius), len(update))
    whole = lattice.rounded(update, terms.clipping_norm)
    whole += discrete_gaussian(WordStream(seed, _LABEL), terms.sigma, len(update))
    return whole.astype("<u4")


def noisy_mean(total: RingVector, terms: NoiseTerms, count: int) -> NDArray[np.float32]:
    """The mean of `count` noisy updates from their sum, uint32 [P]: float32 [P]."""
    lattice = Lattice.of(terms.clipping_norm, Fraction(terms.radius), len(total))
    signed = total.astype("<u4").view("<i4").astype(np.float64)
    mean: NDArray[np.float32] = (signed * (lattice.step / count)).astype(np.float32)
    return mean
