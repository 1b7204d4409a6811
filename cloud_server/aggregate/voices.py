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

import numpy as np
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
MOST_PEERS = 1024
"""An update is compared with so many others: time and memory grow with the cohort and not with its square."""
FEWEST = 3
"""Of fewer replies nobody can tell who is wrong."""
_NORMAL = 1.4826
"""A normal deviation is so many times the median of the distances from the median."""
_TINY = torch.finfo(torch.float64).tiny


def drawn_peers(rows: int, seed: int) -> torch.Tensor:
    """Whom every update of a cohort is compared with: all, or `MOST_PEERS` of them drawn by chance; int64 [M], rising.

    Args:
        seed: of the round: nobody knows before who will be drawn.
    """
    if rows <= MOST_PEERS:
        return torch.arange(rows)
    drawn = np.random.default_rng([seed, rows]).choice(rows, MOST_PEERS, replace=False)
    return torch.from_numpy(np.sort(drawn))


def shared_voices(
    cosines: torch.Tensor, peers: torch.Tensor, kindred: torch.Tensor | None = None
) -> torch.Tensor:
    """1 for who is like no other, n to the power of −`CHORUS` for each of n that are alike: float64 [K].

    Args:
        cosines: of all rows with those of the peers, float64 [K, M].
        peers: from `drawn_peers`.
        kindred: from `kindred_voices`: what is usual is found among those that have kin; all of them if not given.
    """
    rows = len(cosines)
    everybody = torch.ones(rows, dtype=torch.float64, device=cosines.device)
    asked = (everybody if kindred is None else kindred)[peers] > 0.5
    if int(asked.sum()) < FEWEST:
        return everybody
    others = cosines[peers[asked]][:, asked].fill_diagonal_(torch.nan)
    # The median of each row's median: neither a minority's rows nor its columns decide what is usual.
    usual = float(others.nanmedian(dim=1).values.median().clamp(min=0.0))
    if usual >= 1.0 - 1e-9:
        return everybody
    pairs = others[~others.isnan()]
    spread = max(LEAST_SPREAD, _NORMAL * float((pairs - pairs.median()).abs().median())) / (1.0 - usual)
    begin = min(ALIKE_FROM * spread, NEVER_ALIKE)
    end = max(min(ALIKE * spread, SURELY_ALIKE), begin + SURELY_ALIKE - NEVER_ALIKE)
    excess = (((cosines - usual) / (1.0 - usual) - begin) / (end - begin)).clamp(min=0.0, max=1.0)
    return (1.0 + _sum_over_others(excess, peers)) ** -CHORUS


def kindred_voices(cosines: torch.Tensor, peers: torch.Tensor) -> torch.Tensor:
    """0 for who has nothing in common with anybody, neither along nor against, 1 for who has: float64 [K].

    Args:
        cosines: of all rows with those of the peers, float64 [K, M].
        peers: from `drawn_peers`.
    """
    squares = _sum_over_others(cosines.square(), peers)
    usual = float(squares.median()) if len(cosines) else 0.0
    if len(cosines) < FEWEST or usual <= _TINY:
        return torch.ones_like(squares)
    return ((squares / usual - NO_KIN) / (KIN - NO_KIN)).clamp(min=0.0, max=1.0)


def with_the_others(units: torch.Tensor, lengths: torch.Tensor, voices: torch.Tensor) -> torch.Tensor:
    """The cosine of each row with the weighted sum of all others, float64 [K]; 0 where one of the two is nothing.

    Args:
        units: rows of length 1, float64 [K, D].
        lengths: what each row is multiplied with, float64 [K].
        voices: float64 [K].
    """
    with_sum = lengths * (units @ ((voices * lengths) @ units))
    squares = lengths.square()
    own = voices * squares
    along = with_sum - own
    length = (voices @ with_sum - 2.0 * voices * with_sum + voices * own).clamp(min=0.0).sqrt()
    return along / (length * lengths).clamp(min=_TINY)


def _sum_over_others(values: torch.Tensor, peers: torch.Tensor) -> torch.Tensor:
    """Over all others, judged by those that are peers: float64 [K] of [K, M], which is used up."""
    rows, many = values.shape
    values[peers, torch.arange(many)] = 0.0
    asked = torch.full((rows,), float(many), dtype=torch.float64, device=values.device)
    asked[peers] -= 1.0
    return values.sum(dim=1) * ((rows - 1.0) / asked.clamp(min=1.0))
