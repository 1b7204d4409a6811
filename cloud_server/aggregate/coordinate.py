"""Coordinate-wise rules: the median and the trimmed mean of each parameter on its own.

Source: Yin et al., "Byzantine-robust distributed learning: towards optimal statistical rates",
arXiv:1803.01498. Both withstand fewer than half of the rows, and lose what honest devices disagree on:
with labels that differ from device to device they are biased.
"""

from __future__ import annotations

import math

import torch

from cloud_server.aggregate.sorting_network import mean_of_ranks
from wire.errors import ConfigurationError


def coordinate_median(matrix: torch.Tensor) -> torch.Tensor:
    """The median of each column of float32 [K, P]; of an even number of rows, the mean of the middle two."""
    rows = len(matrix)
    return mean_of_ranks(matrix, {(rows - 1) // 2, rows // 2})


def trimmed_mean(matrix: torch.Tensor, share: float) -> torch.Tensor:
    """The mean of each column of float32 [K, P] without its ⌊share · K⌋ smallest and as many largest values.

    Raises:
        ConfigurationError: (operator) `share` is not in [0, 0.5).
    """
    if not 0.0 <= share < 0.5:
        raise ConfigurationError(f"a trimmed share of {share} leaves nothing", hint="give 0 ≤ share < 0.5")
    rows = len(matrix)
    # 0.2 · 15 is 3.0000000000000004 in float64 and 0.29 · 100 is 28.999999999999996.
    cut = min(math.floor(share * rows + 1e-9), (rows - 1) // 2)
    return mean_of_ranks(matrix, range(cut, rows - cut))
