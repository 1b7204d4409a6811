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

_BLOCK = 16_384


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


def heard_trimmed_mean(matrix: torch.Tensor, voices: torch.Tensor, share: float) -> torch.Tensor:
    """The weighted mean of each column of float32 [K, P] without `share` of the voices on either side, float32 [P].

    A row that lies across the cut counts with what is left of its voice.

    Args:
        voices: float64 [K], not negative, their sum positive.

    Raises:
        ConfigurationError: (operator) `share` is not in [0, 0.5).
    """
    if not 0.0 <= share < 0.5:
        raise ConfigurationError(f"a trimmed share of {share} leaves nothing", hint="give 0 ≤ share < 0.5")
    shares = voices / voices.sum()
    result = torch.empty(matrix.shape[1], dtype=torch.float32, device=matrix.device)
    for start in range(0, matrix.shape[1], _BLOCK):
        values, order = matrix[:, start : start + _BLOCK].T.contiguous().sort(dim=1, stable=True)
        end = shares[order].cumsum_(dim=1)
        begin = end - shares[order]
        kept = (end.clamp_(max=1.0 - share) - begin.clamp_(min=share)).clamp_(min=0.0)
        result[start : start + _BLOCK] = ((kept * values).sum(dim=1) / kept.sum(dim=1)).float()
    return result
