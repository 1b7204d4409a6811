"""Inner products between all updates of a cohort: enough for every rule that is made of distances.

Whatever is a weighted mean of the rows has its distance to each of them in the Gram matrix, so Krum and the
geometric median read the parameters once, not once a pair or an iteration.
"""

from __future__ import annotations

import torch

_BLOCK = 65_536


def gram_matrix(matrix: torch.Tensor) -> torch.Tensor:
    """Inner products of the rows of float32 [K, P]: float64 [K, K], on the same device.

    Products and sums are float64: distances come out as differences of large numbers, and an attacker
    chooses how large they are.
    """
    rows, size = matrix.shape
    gram = torch.zeros((rows, rows), dtype=torch.float64, device=matrix.device)
    for start in range(0, size, _BLOCK):
        block = matrix[:, start : start + _BLOCK].double()
        gram.addmm_(block, block.T)
    return gram


def squared_distances(gram: torch.Tensor) -> torch.Tensor:
    """Squared distances between all rows, float64 [K, K], from their Gram matrix; never negative."""
    squares = gram.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2.0 * gram).clamp_(min=0.0)
    return distances.fill_diagonal_(0.0)


def weighted_mean(matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ wᵢ · rowᵢ / Σ wᵢ as float32 [P]; summed in float64.

    Args:
        matrix: float32 [K, P].
        weights: float64 [K], not negative, their sum positive.
    """
    shares = weights / weights.sum()
    result = torch.empty(matrix.shape[1], dtype=torch.float32, device=matrix.device)
    for start in range(0, matrix.shape[1], _BLOCK):
        block = matrix[:, start : start + _BLOCK].double()
        result[start : start + _BLOCK] = (shares @ block).float()
    return result
