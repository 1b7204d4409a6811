"""Clipping to the cohort's median length: what the default rule begins with. (Weights are capped in `influence.py`.)

An update longer than the median of all keeps its direction and loses its length, so a boosted one is no longer than
any other. It needs the lengths alone. Source: Sun et al., "Can you really backdoor federated learning?",
arXiv:1911.07963, with the bound of each round taken from the round itself.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def median_length(norms: Sequence[float]) -> float:
    """The median of the positive lengths (devices that send zeros cannot shrink the others' updates to nothing); `inf`
    where nobody moved."""
    moving = [norm for norm in norms if norm > 0.0]
    return statistics.median(moving) if moving else math.inf


def clip_factors(norms: Sequence[float], limit: float | None = None) -> list[float]:
    """What each update is multiplied with, in (0, 1].

    Args:
        norms: L2 lengths of the updates, finite.
        limit: the longest that stays as it is; `median_length` if not given.
    """
    if limit is None:
        limit = median_length(norms)
    return [1.0 if norm <= limit else limit / norm for norm in norms]
