"""Robust rules by what they need to know, for whoever does not import torch: vectors in, one vector out.

Laws of the file: at most `MAX_ROWS` rows are in memory, whatever the cohort; every reply counts once, whatever weight
it claims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_server.aggregate.coordinate import coordinate_median, trimmed_mean
from cloud_server.aggregate.geometric_median import geometric_median
from cloud_server.aggregate.krum import multi_krum
from cloud_server.aggregate.rows import gather_rows

Device: TypeAlias = torch.device
Rule: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""From float32 [K, P] to float32 [P], on the same device."""

MEDIAN: Rule = coordinate_median
GEOMETRIC_MEDIAN: Rule = geometric_median


def trimmed(share: float) -> Rule:
    """The trimmed mean that leaves out `share` of the rows on either side."""
    return lambda matrix: trimmed_mean(matrix, share)


def krum(replies: int, share: float) -> Rule:
    """MultiKrum that expects this share of so many replies to be false.

    A false reply spoils the bucket that it is in, so that above 64 replies more rows are expected to be false; never
    more than the rule can stand.
    """
    false = math.ceil(share * replies - 1e-9)
    return lambda matrix: multi_krum(matrix, max(0, min(false, (len(matrix) - 3) // 2)))


def aggregate_rows(
    vectors: Iterable[NDArray[np.float32]],
    count: int,
    size: int,
    rule: Rule,
    *,
    seed: int,
    device: Device | None = None,
) -> NDArray[np.float32]:
    """One update of many by a rule: float32 [size].

    Args:
        vectors: `count` vectors, float32 [size], finite.
        seed: draws the buckets of more than `MAX_ROWS` vectors.
        device: from `aggregate.fold.choose_device`; the CPU if not given.

    Raises:
        UpdateError: (us) another number, shape or type of vectors.
        RoundError: the rule can make nothing of them.
    """
    matrix = gather_rows(vectors, count, size, device=device or torch.device("cpu"), seed=seed)
    result: NDArray[np.float32] = rule(matrix).cpu().numpy()
    return result
