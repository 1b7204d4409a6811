"""The noise of DP-SGD: standard normal values from a cryptographic stream whose seed never leaves the device.

Laws of the file: the seed is 32 bytes of the caller's source (the operating system's, on a device), used once and kept
nowhere; nobody who does not know it can predict a value. Values are floating point: the noise hides a sample in what a
model remembers, and makes no claim about the lowest bits of one update (`wire/discrete_gaussian.py` does, for
aggregates). Source: Box and Muller, "A note on the generation of random normal deviates" (1958); FIPS 202 (SHAKE256).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from edge_agent.ports import Floats
from wire.discrete_gaussian import SEED_BYTES, WordStream

_LABEL: Final = b"dp-sgd"


class SampleNoise:
    """A stream of standard normal values.

    Args:
        random: gives that many unpredictable bytes.
    """

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self._words = WordStream(random(SEED_BYTES), _LABEL)

    def take(self, steps: int, size: int) -> Floats:
        """The next values, float32 [steps, size]: no two calls give the same; none is beyond 8.6."""
        pairs = -(-steps * size // 2)
        # 53 bits each, the middle of its interval, so that no logarithm is of 0.
        uniform = ((self._words.take(2 * pairs) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), (2.0 * np.pi) * uniform[pairs:]
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return values[: steps * size].reshape(steps, size).astype(np.float32)
