"""What an operator asks of differential privacy. Pure, frozen data.

*Whose* privacy: one device's. Two runs that must look alike are one with and one without what a device's data say, its
updates replaced by zeros ("zero-out" neighbours: Kairouz et al., arXiv:2103.00039); that a device is enrolled, present
or was drawn is not hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from wire.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyPlan:
    """Central differential privacy: each device is trusted to the aggregator, and the aggregator adds the noise.

    Attributes:
        clipping_norm: L2 bound of one update; fixed for the run.
        noise_multiplier: standard deviation of the noise on the sum, in clipping norms.
        sampling_rate: probability with which each present device is asked, independently of all others.
        epsilon, delta: what all rounds of this fleet together may spend.

    Raises:
        ConfigurationError: (operator) a value out of bounds; names it.
    """

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
