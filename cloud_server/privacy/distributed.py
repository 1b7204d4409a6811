"""Distributed differential privacy: how much noise each device adds, and what the sum of it is worth.

    R = radius of the clip on the lattice,  σ = a device's noise,  z = σ √honest / R  (at least what was asked for)

Laws of the file: pure; noise is calibrated to the fewest devices whose updates may be summed (the cohort less the share
that may drop out), less those that may tell what they drew; whoever else delivers only adds to it; the sum of discrete
Gaussians is not one, and what that costs is counted; the modulus is wide enough that a sum wraps with a probability of
at most `WRAP`. Source: Kairouz, Liu, Steinke, "The distributed discrete Gaussian mechanism for federated learning with
secure aggregation" (2021), proposition 14; Canonne, Kamath, Steinke (2020), corollary 17, for the tails.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Final

from wire.errors import ConfigurationError, QuorumError
from wire.lattice import Lattice
from wire.mask_terms import MAX_HELPED_MEMBERS, NoiseTerms

WRAP: Final = 2.0**-40
"""Largest probability that any parameter's sum wraps."""
MIN_SIGMA: Final = 64
MAX_SIGMA: Final = 2**20
_HALF: Final = 2**31


def noise_terms(
    *,
    members: int,
    dropout: float,
    colluding: float,
    clipping_norm: float,
    noise_multiplier: float,
    size: int,
) -> NoiseTerms:
    """The noise of each device of a sum.

    Args:
        members: devices that the sum was opened with.
        dropout: share of them that may not deliver; a sum of fewer is not unmasked.
        colluding: share of them that may tell the noise that they drew; they count for none.
        noise_multiplier: standard deviation of what is left on the sum, in clips.
        size: P.

    Raises:
        QuorumError: nobody's noise would be left.
        ConfigurationError: (operator) so much noise that nothing of an update is left, or that the ring is too narrow.
    """
    quorum = members - math.floor(dropout * members)
    honest = quorum - math.floor(colluding * members)
    if honest < 1:
        raise QuorumError("no honest device would be left to add noise", present=members)
    # Everybody's clip in one parameter, and the tail of everybody's noise, for all parameters at once.
    tail = math.sqrt(2 * math.log(2 * size / WRAP))
    per_sigma = members * math.sqrt(honest) / noise_multiplier + tail * math.sqrt(members)
    sigma = min(MAX_SIGMA, math.floor((_HALF - 1 - members) / per_sigma))
    radius = math.floor(sigma * math.sqrt(honest) / noise_multiplier)
    if sigma < MIN_SIGMA or radius < 1:
        raise ConfigurationError(
            f"a noise multiplier of {noise_multiplier:g} does not fit a ring of 32 bits with {members} devices",
            hint="raise privacy.noise_multiplier a little, or lower it if it is in the hundreds",
            members=members,
        )
    Lattice.of(clipping_norm, Fraction(radius), size)
    return NoiseTerms(clipping_norm=clipping_norm, radius=radius, sigma=sigma, quorum=quorum)


def accounted_multiplier(
    noise_multiplier: float, size: int, *, sigma: float = MIN_SIGMA, members: int = MAX_HELPED_MEMBERS
) -> float:
    """What a sum of discrete Gaussians is worth as a single Gaussian: a little less than its noise multiplier.

    Args:
        noise_multiplier: standard deviation of the sum, in clips.
        size: P.
        sigma: of one device; the least there is covers every round.
        members: devices in the sum; the most there are cover every round.
    """
    apart = 10.0 * sum(
        math.exp(-2 * math.pi**2 * sigma**2 * count / (count + 1)) for count in range(1, members)
    )
    by_norm = math.sqrt(1 / noise_multiplier**2 + apart * size / 2)
    by_shift = 1 / noise_multiplier + apart * math.sqrt(size)
    return 1 / min(by_norm, by_shift)
