"""Order statistics of every coordinate by a network of minimum and maximum: exact, and the same on CPU and GPU.

A sort along the short axis visits each coordinate on its own; a network runs its few hundred comparators over
whole blocks of coordinates at memory speed, and comparators that no wanted output depends on are left out.
Source: Batcher, "Sorting networks and their applications", AFIPS 1968 (odd-even merge sort, here for any
number of rows).
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import torch

_BLOCK = 16_384
"""Coordinates at a time: 64 rows of them stay in the second-level cache."""


@lru_cache(maxsize=128)
def comparators(rows: int, wanted: frozenset[int]) -> tuple[tuple[int, int], ...]:
    """The comparators (i, j), i < j, that bring the wanted ranks (0 = smallest) to their places, in order."""
    network: list[tuple[int, int]] = []
    width = 1
    while width < rows:
        step = width
        while step >= 1:
            for start in range(step % width, rows - step, 2 * step):
                pairs = ((i, i + step) for i in range(start, min(start + step, rows - step)))
                network += [(i, j) for i, j in pairs if i // (2 * width) == j // (2 * width)]
            step //= 2
        width *= 2
    needed, kept = set(wanted), []
    for pair in reversed(network):
        if needed & set(pair):
            needed |= set(pair)
            kept.append(pair)
    return tuple(reversed(kept))


def mean_of_ranks(matrix: torch.Tensor, ranks: Collection[int]) -> torch.Tensor:
    """The mean of the values of these ranks, for each column.

    Args:
        matrix: float32 [K, P], finite.
        ranks: of 0 … K − 1 in ascending order; at least one.

    Returns:
        float32 [P] on the same device; summed in float64.
    """
    rows, size = matrix.shape
    wanted = sorted(ranks)
    network = comparators(rows, frozenset(wanted))
    result = torch.empty(size, dtype=torch.float32, device=matrix.device)
    for start in range(0, size, _BLOCK):
        values = list(matrix[:, start : start + _BLOCK].unbind(0))
        for low, high in network:
            values[low], values[high] = (
                torch.minimum(values[low], values[high]),
                torch.maximum(values[low], values[high]),
            )
        total = torch.zeros_like(values[0], dtype=torch.float64)
        for rank in wanted:
            total += values[rank]
        result[start : start + _BLOCK] = (total / len(wanted)).float()
    return result
