"""What an operator asks of differential privacy. Pure, frozen data.

*Whose* privacy: one device's. Two runs that must look alike are one with and one without what a device's data say, its
updates replaced by zeros ("zero-out" neighbours: Kairouz et al., arXiv:2103.00039); that a device is enrolled, present
or was drawn is not hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from wire.errors import ConfigurationError

PrivacyMode = Literal["central", "distributed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyPlan:
    """What rounds do, and what they may spend.

    Attributes:
        mode: `central`: the aggregator, which is trusted with updates, adds the noise to their sum. `distributed`:
            devices add it under masks, and the aggregator sees a noisy sum only.
        clipping_norm: L2 bound of one update; fixed for the run.
        noise_multiplier: standard deviation of the noise on the sum, in clipping norms.
        sampling_rate: probability with which each present device is asked, independently of all others. Distributed, it
            saves work and counts for nothing: the aggregator knows whom it asked.
        epsilon, delta: what all rounds of this fleet together may spend.

    Raises:
        ConfigurationError: (operator) a value out of bounds; names it.
    """

    mode: PrivacyMode = "central"
    clipping_norm: float = 1.0
    noise_multiplier: float = 1.0
    sampling_rate: float = 0.1
    epsilon: float = 8.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        bounds = {
            "clipping_norm": (1e-9, 1e9),
            "noise_multiplier": (0.01, 1000.0),
            "sampling_rate": (1e-9, 1.0),
            "epsilon": (1e-6, 1e6),
            "delta": (1e-15, 0.1),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if not math.isfinite(value) or not least <= value <= most:
                raise ConfigurationError(
                    f"privacy: {name} is {value}", hint=f"use a number from {least:g} to {most:g}", name=name
                )
