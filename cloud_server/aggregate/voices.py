"""How much each update of a cohort counts, by the angles between them: who says the same shares one voice, and who
says what nobody else speaks of has none.

Conspirators send what is alike: the same poison, the same backdoor, one false vector with small changes. Honest devices
hold different data, and after the first rounds their updates stand nearly at right angles, so that a group which is
much more alike than the cohort's usual pair counts for less than one device. How far pairs of honest devices differ is
the fleet's own matter (labels or people that several devices share make some pairs alike), so the measure is the spread
of all pairs. Updates that learn of the same kind of data, or against it, have something in common with some of the
others; noise stands at right angles to everybody. Sources: Fung, Yoon and Beschastnikh, "The limitations of federated
learning in sybil settings", RAID 2020 (FoolsGold: likeness shows a sybil; here a group keeps a part of a voice, so that
alike honest devices are heard).

Laws of the file: pure; float64; the order of the rows does not matter; a cohort of one or two keeps all its voices.
"""

from __future__ import annotations

import torch

ALIKE_FROM = 2.0
ALIKE = 4.0
"""Deviations of all pairs above the usual one, from which two updates begin to say the same, and do."""
LEAST_SPREAD = 0.05
"""Of pairs: what a cohort of devices with the same data differs by is chance."""
NEVER_ALIKE = 0.5
SURELY_ALIKE = 0.6
"""The same as shares of the way from the usual cosine to 1: the first never begins later, the second ends the ramp."""
CHORUS = 2.0
"""At 1 a group of any size counts as one device; above, the larger a chorus the quieter it is."""
NO_KIN = 0.02
KIN = 0.12
"""Of the cohort's usual sum of squared cosines: between the two a voice goes from nothing to all. A vector of noise
has a hundredth part, the device with the oddest data of our fleets a sixth."""
FEWEST = 3
"""Of fewer replies nobody can tell who is wrong."""
_NORMAL = 1.4826
"""A normal deviation is so many times the median of the distances from the median."""
_TINY = torch.finfo(torch.float64).tiny


def shared_voices(cosines: torch.Tensor, kindred: torch.Tensor | None = None) -> torch.Tensor:
    """1 for who is like no other, n to the power of −`CHORUS` for each of n that are alike: float64 [K].

    Args:
        cosines: between all rows, float64 [K, K].
        kindred: from `kindred_voices`: what is usual is found among those that have kin; all of them if not given.
    """
    rows = len(cosines)
    everybody = torch.ones(rows, dtype=torch.float64, device=cosines.device)
    asked = everybody.bool() if kindred is None else kindred > 0.5
    if int(asked.sum()) < FEWEST:
        return everybody
    others = cosines[asked][:, asked].clone().fill_diagonal_(torch.nan)
    # The median of each row's median: neither a minority's rows nor its columns decide what is usual.
    usual = float(others.nanmedian(dim=1).values.median().clamp(min=0.0))
    if usual >= 1.0 - 1e-9:
        return everybody
    pairs = others[~others.isnan()]
    spread = max(LEAST_SPREAD, _NORMAL * float((pairs - pairs.median()).abs().median())) / (1.0 - usual)
    begin = min(ALIKE_FROM * spread, NEVER_ALIKE)
    end = max(min(ALIKE * spread, SURELY_ALIKE), begin + SURELY_ALIKE - NEVER_ALIKE)
    excess = (((cosines - usual) / (1.0 - usual) - begin) / (end - begin)).clamp(min=0.0, max=1.0)
    return excess.fill_diagonal_(1.0).sum(dim=1) ** -CHORUS


def kindred_voices(cosines: torch.Tensor) -> torch.Tensor:
    """0 for who has nothing in common with anybody, neither along nor against, 1 for who has: float64 [K].

    Args:
        cosines: between all rows, float64 [K, K].
    """
    squares = cosines.square().fill_diagonal_(0.0).sum(dim=1)
    usual = float(squares.median()) if len(cosines) else 0.0
    if len(cosines) < FEWEST or usual <= _TINY:
        return torch.ones_like(squares)
    return ((squares / usual - NO_KIN) / (KIN - NO_KIN)).clamp(min=0.0, max=1.0)


def with_the_others(gram: torch.Tensor, voices: torch.Tensor) -> torch.Tensor:
    """The cosine of each row with the weighted sum of all others, float64 [K]; 0 where one of the two is nothing.

    Args:
        gram: inner products of the rows, float64 [K, K].
        voices: float64 [K].
    """
    own = voices * gram.diagonal()
    with_sum = gram @ voices
    along = with_sum - own
    length = (voices @ with_sum - 2.0 * voices * with_sum + voices * own).clamp(min=0.0).sqrt()
    return along / (length * gram.diagonal().sqrt()).clamp(min=_TINY)
