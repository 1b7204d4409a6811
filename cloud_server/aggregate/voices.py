"""How much each update of a cohort counts, by the angles between them: who says the same shares one voice, and who
pulls back has none.

Conspirators send what is alike: the same poison, the same backdoor, one false vector with small changes. Honest devices
hold different data, and after the first rounds their updates stand nearly at right angles, so that a group which is
much more alike than the cohort's usual pair counts about as one device. Who points against the way that the head has
gone (in the first round: against the others) counts less, and from `RAMP` on nothing: that is a mean turned around or
held up. Sources: Fung, Yoon and Beschastnikh, "The limitations of federated learning in sybil settings", RAID 2020
(FoolsGold: likeness shows a sybil; here a group keeps one voice, so that alike honest devices are heard); Cao et al.,
"FLTrust", arXiv:2012.13995 (no weight for a cosine below zero); Karimireddy, He and Jaggi, "Learning from history for
Byzantine robust optimization", ICML 2021 (the head's own way tells what one round cannot).

Laws of the file: pure; float64; the order of the rows does not matter; a cohort of one or two keeps all its voices.
"""

from __future__ import annotations

import torch

LIKENESS = 0.6
"""Two updates say the same when their cosine is this share of the way from the cohort's usual one to 1. Two wrists of
one person stay below it, devices that learn one backdoor lie above."""
CHORUS = 1.5
"""At 1 a group of any size counts as one device; above, the larger a chorus the quieter it is."""
RAMP = 0.3
"""Between the standings at which a device is not heard and is heard in full."""
FEWEST = 3
"""Of fewer replies nobody can tell who is wrong."""
_TINY = torch.finfo(torch.float64).tiny


def shared_voices(cosines: torch.Tensor) -> torch.Tensor:
    """1 for who is like no other, n to the power of −`CHORUS` for each of n that are alike: float64 [K].

    Args:
        cosines: between all rows, float64 [K, K].
    """
    rows = len(cosines)
    if rows < FEWEST:
        return torch.ones(rows, dtype=torch.float64, device=cosines.device)
    others = cosines.clone().fill_diagonal_(torch.nan)
    # The median of each row's median: neither a minority's rows nor its columns decide what is usual.
    usual = float(others.nanmedian(dim=1).values.median().clamp(min=0.0))
    if usual >= 1.0 - 1e-9:
        return torch.ones(rows, dtype=torch.float64, device=cosines.device)
    excess = ((cosines - usual) / (LIKENESS * (1.0 - usual))).clamp(min=0.0, max=1.0)
    return excess.square().fill_diagonal_(1.0).sum(dim=1) ** -CHORUS


def forward_voices(standings: torch.Tensor) -> torch.Tensor:
    """1 for who goes along with the head's way, less for who pulls back, 0 from `RAMP` on: float64 [K].

    Where half of the cohort points away from it, the way is no measure any more (the fleet has turned, or has nearly
    arrived): then the median of the cohort is.

    Args:
        standings: float64 [K].
    """
    if len(standings) < FEWEST:
        return torch.ones_like(standings)
    usual = standings.median().clamp(max=0.0)
    return (1.0 + (standings - usual) / RAMP).clamp(min=0.0, max=1.0)


def trusted_voices(standings: torch.Tensor) -> torch.Tensor:
    """0 for who does not go where the operator's samples go, 1 from `RAMP` on: float64 [K].

    Args:
        standings: float64 [K].
    """
    return (standings / RAMP).clamp(min=0.0, max=1.0)


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
