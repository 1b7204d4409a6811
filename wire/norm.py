"""The length of an update, measured alike by the device that clips it and the cloud that screens it.

Laws of the file: pure; float64 sums, where no square of a float32 overflows; no BLAS, which starts a thread for each
core where nobody told it not to: one product of 2.5 million values then cost 605 ms of CPU, and this costs 2.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# The squares of one tile stay in the cache.
_TILE = 32_768


def l2_norm(vector: NDArray[np.float32]) -> float:
    """L2 norm of finite float32 [P]."""
    total = 0.0
    for start in range(0, len(vector), _TILE):
        total += float(np.square(vector[start : start + _TILE], dtype=np.float64).sum())
    return math.sqrt(total)
