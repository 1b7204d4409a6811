"""The geometric median: the point with the smallest sum of distances to all updates.

Source: Pillutla, Kakade and Harchaoui, "Robust aggregation for federated learning", arXiv:1912.13445 (smoothed
Weiszfeld). It withstands fewer than half of the rows, at whatever length their updates have.
"""

from __future__ import annotations

import torch

from cloud_server.aggregate.gram import gram_matrix, weighted_mean

_ITERATIONS = 64
_TOLERANCE = 1e-9
_LONGEST = 1e4
"""In median lengths. A row further out pulls no harder, only its direction counts: shortening it changes nothing but
the digits that would be lost where 1e30 stands beside 1."""
_SMOOTHING = 1e-6
"""Of the median distance: keeps the weight of a row finite on which the median comes to lie."""


def geometric_median(matrix: torch.Tensor) -> torch.Tensor:
    """The geometric median of the rows of float32 [K, P], as float32 [P]."""
    gram = gram_matrix(matrix)
    lengths = gram.diagonal().sqrt()
    if float(lengths.median()) == 0.0:
        return torch.zeros_like(matrix[0])  # half of the rows are the origin
    factors = (_LONGEST * lengths.median() / lengths.clamp(min=1e-300)).clamp(max=1.0)
    weights = factors * median_weights(gram * factors[:, None] * factors[None, :])
    return weighted_mean(matrix, weights) * float(weights.sum())


def median_weights(gram: torch.Tensor) -> torch.Tensor:
    """The shares (float64 [K], sum 1) that make the weighted mean of the rows their geometric median.

    Every step of Weiszfeld's iteration is a weighted mean of the rows, so its distances follow from the
    rows' Gram matrix: ‖uᵢ − Uᵀw‖² = Gᵢᵢ − 2 (G w)ᵢ + wᵀ G w.
    """
    rows = len(gram)
    shares = torch.full((rows,), 1.0 / rows, dtype=torch.float64, device=gram.device)
    for _ in range(_ITERATIONS):
        product = gram @ shares
        distances = (gram.diagonal() - 2.0 * product + shares @ product).clamp(min=0.0).sqrt()
        floor = _SMOOTHING * distances.median()
        if float(floor) == 0.0:
            return shares  # half of the rows are this very point
        inverse = 1.0 / distances.clamp(min=float(floor))
        renewed = inverse / inverse.sum()
        change = float((renewed - shares).abs().max())
        shares = renewed
        if change < _TOLERANCE:
            break
    return shares
