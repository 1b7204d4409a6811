"""MultiKrum: the mean of the updates that have the closest neighbours.

Source: Blanchard et al., "Machine learning with adversaries: Byzantine tolerant gradient descent", NeurIPS 2017.
The guarantee holds for 2 f + 2 < K rows with f false ones among them.
"""

from __future__ import annotations

import torch

from cloud_server.aggregate.gram import gram_matrix, squared_distances, weighted_mean
from wire.errors import RoundError


def multi_krum(matrix: torch.Tensor, attackers: int, selected: int | None = None) -> torch.Tensor:
    """The mean of the rows with the smallest scores, as float32 [P].

    A row's score is the sum of squared distances to its K − f − 2 nearest others; of equal scores the
    earlier row wins.

    Args:
        matrix: float32 [K, P].
        attackers: f, how many rows may be false.
        selected: how many rows are averaged; K − f − 2 if not given.

    Raises:
        RoundError: too few rows for so many attackers.
    """
    rows = len(matrix)
    neighbours = rows - attackers - 2
    if attackers < 0 or neighbours < 1 or rows <= 2 * attackers + 2:
        raise RoundError(
            f"MultiKrum with {attackers} attackers needs more than {2 * attackers + 2} updates, there are {rows}",
            rows=rows,
            attackers=attackers,
        )
    distances = squared_distances(gram_matrix(matrix)).fill_diagonal_(torch.inf)
    scores = distances.sort(dim=1).values[:, :neighbours].sum(dim=1)
    best = scores.sort(stable=True).indices[: selected or neighbours]
    weights = torch.zeros(rows, dtype=torch.float64, device=matrix.device)
    weights[best] = 1.0
    return weighted_mean(matrix, weights)
