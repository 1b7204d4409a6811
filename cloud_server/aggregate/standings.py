"""What became of a device in rounds before, where samples are trusted: its standing, a decayed sum of cosines, and the
voice that goes with it. (Without samples a device stands by its answers: `answers.py`.)

A cosine says something where the devices that are heard agree on a direction. A fleet that learns has one; near the end
each device of a fleet with different data pulls to where its own data lie, half of them against the way, and a sign
says nothing of honesty. So each kind of evidence counts by the *accord* of those that are heard, and standings neither
grow nor fade while there is none. Who has pulled the head away makes the others agree again, and is found out.
Sources: Karimireddy, He and Jaggi, "Learning from history for Byzantine robust optimization", ICML 2021 (the head's own
way tells what one round cannot); Cao et al., "FLTrust", arXiv:2012.13995 (the operator's samples as root of trust).

Laws of the file: pure; float64; the order of the devices does not matter.
"""

from __future__ import annotations

import torch

KEPT = 0.9
"""Of a standing, from one reply to the next in full accord: half of it is gone after seven."""
ACCORD = 0.1
"""The cosine of the median device that is full accord."""
UNHEARD = -0.15
"""At this standing, and below, a device is not heard."""
RAMP = 0.2
"""Between the standings at which a device is not heard and is heard in full."""


def standing_voices(standings: torch.Tensor) -> torch.Tensor:
    """0 up to `UNHEARD`, 1 from `RAMP` above it, float64 [K]; a device that nothing is known of has 0.75.

    Args:
        standings: float64 [K].
    """
    return ((standings - UNHEARD) / RAMP).clamp(min=0.0, max=1.0)


def fleets_voices(standings: torch.Tensor) -> torch.Tensor:
    """The same, measured from the cohort's median where that is below 0: somebody is always heard."""
    return standing_voices(standings - standings.median().clamp(max=0.0))


def accord(cosines: torch.Tensor, voices: torch.Tensor) -> float:
    """How far those that are heard go along, from 0 to 1: by the cosine of their median.

    Args:
        cosines: with a direction, float64 [K], at least one.
        voices: float64 [K], not negative; where all are 0 every device counts the same.
    """
    return min(max(heard_median(cosines, voices) / ACCORD, 0.0), 1.0)


def heard_median(values: torch.Tensor, voices: torch.Tensor) -> float:
    """The median of values float64 [K], each of which counts by its voice, or all the same where all voices are 0."""
    order = values.argsort()
    ends = (voices if float(voices.sum()) > 0.0 else torch.ones_like(voices))[order].cumsum(0)
    return float(values[order][torch.searchsorted(ends, 0.5 * ends[-1])])


def contradiction(way: torch.Tensor, reference: torch.Tensor) -> float:
    """How far the way of the head leads against the operator's samples, from 0 to 1.

    Args:
        way: of the head, float64 [D], of length 1.
        reference: where the samples lead, likewise.
    """
    return min(max(-float(way @ reference) / ACCORD, 0.0), 1.0)


def moved(standings: torch.Tensor, evidence: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Standings float64 [K] after a round.

    Args:
        evidence: cosines float64 [K] with a direction, and their accord.
    """
    fresh = torch.zeros_like(standings)
    for cosines, weight in evidence:
        fresh += weight * cosines
    faded = (1.0 - KEPT) * max((weight for _, weight in evidence), default=0.0)
    return (1.0 - faded) * standings + fresh
