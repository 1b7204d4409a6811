"""A data set divided among devices so that each has its own mix of labels.

Law of the file: a partition depends on its arguments alone. Source: Hsu et al., "Measuring the effects of non-identical
data distribution for federated visual classification", https://arxiv.org/abs/1909.06335.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from models.data.federation import Labels
from wire.errors import ConfigurationError

_MAX_DRAWS = 1000


def partition_dirichlet(
    labels: Labels, devices: int, alpha: float, seed: int, *, smallest: int = 20
) -> list[npt.NDArray[np.int64]]:
    """Divides samples so that each device has its own mix of labels.

    Args:
        labels: int64 [N].
        devices: number of shares.
        alpha: concentration; below 1 most devices see few labels, at 100 all see the same mix.
        seed: decides the partition.
        smallest: no share is smaller; the draw is repeated until that is so.

    Returns:
        For each device the indices of its samples, in random order; together every index once.

    Raises:
        ConfigurationError: (operator) no such partition can be drawn.
    """
    if devices < 1 or not alpha > 0.0 or devices * smallest > len(labels):
        raise ConfigurationError(
            f"{len(labels)} samples cannot be divided among {devices} devices with alpha {alpha}",
            hint="alpha must be above 0, and every device needs some samples",
        )
    rng = np.random.default_rng(seed)
    for _ in range(_MAX_DRAWS):
        shares = _draw(labels, devices, alpha, rng)
        if min(map(len, shares)) >= smallest:
            return shares
    raise ConfigurationError(
        f"no share of at least {smallest} samples for each of {devices} devices with alpha {alpha}",
        hint="take a larger alpha or fewer devices",
    )


def _draw(
    labels: Labels, devices: int, alpha: float, rng: np.random.Generator
) -> list[npt.NDArray[np.int64]]:
    parts: list[list[npt.NDArray[Any]]] = [[] for _ in range(devices)]
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(rng.dirichlet([alpha] * devices))[:-1] * len(indices)).astype(np.int64)
        for part, share in zip(parts, np.split(indices, cuts), strict=True):
            part.append(share)
    return [rng.permutation(np.concatenate(part)) for part in parts]
