"""How a device answers when the head moves: who learns lets go of what is learnt, who lies does not.

An honest update leads down the slope of the device's own loss. When the head has moved, that slope has changed, and
along the movement it has changed against it: the gradient of a convex loss is monotone, and a network's loss is curved
upwards where it is trained. So the cosine of a device's update with a round's step is smaller in the round after. The
fall is the device's *answer*. Whoever sends the opposite of what it learnt answers the other way round, noise does not
answer, and who learns false labels or a trigger takes part in little of what the others do and answers little.

This needs no direction that a majority agrees on. Near the end a fleet with different data has none: honest devices
pull to where their own data lie, half of them against the way, and liars along it; by the signs of the cosines alone
a fleet that was heading there went with the liars. What is compared is a device with itself.

A device answers itself too: the chance in its own update is in the step and not in its next one, and who is heard
much would answer much for that alone. Its own part in the step is known, and how alike its two updates are; so that is
left out.

Answers add up to a *standing*: what a device answers less than `ENOUGH` of the usual counts against it, what it answers
more makes good for that, and nothing is saved up for later. Sources: Nesterov, "Introductory lectures on convex
optimization", theorem 2.1.3 (monotone gradients); Zhang, Cao, Jia and Gong, "FLDetector", KDD 2022, arXiv:2207.09209
(updates that do not follow from the head's movement show a liar; there the curvature is estimated, here its sign is
enough); Page, "Continuous inspection schemes", Biometrika 1954 (the one-sided cumulative sum).

Laws of the file: pure; float64; the order of the devices does not matter; no standing is above 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_server.aggregate.standings import KEPT, heard_median

ENOUGH = 0.6
"""Of the usual answer. Honest devices of our fleets answered 0.6 to 2 on the mean of the first five rounds, one in
twenty less; those with false labels or triggers 0.2 to 0.6, but for one whose images had the trigger's label anyway;
who flips signs less than 0."""
MOST = 2.0
"""Of the usual answer, either way: more is not counted."""
SILENT = -1.0
"""At this standing, and below, a device is not heard; at 0 it is heard in full."""
CLEAR = 0.1
"""The usual answer that counts in full; where the head rests answers are chance, and standings rest too."""


TRACE_SIZE = 1021
"""Of a sketch that tells how alike two updates of one device are, within 0.03."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What is kept of an update until its device sends the next.

    Attributes:
        heading: cosine with the step of its round.
        own: what of the heading is the update's own part in the step.
        row: float32 [at most `TRACE_SIZE`], its sketch with length 1; empty in a large cohort, where nobody's own part
            is worth the memory.
    """

    heading: float
    own: float
    row: NDArray[np.float32]

    def of_the_others(self, row: NDArray[np.float32]) -> float:
        """The heading that the next update's is to be held against: without what was the device's own.

        Args:
            row: of the device's next update.
        """
        if not row.size or row.size != self.row.size:
            return self.heading
        return self.heading - self.own * (1.0 - float(self.row @ row))


def answered(standings: torch.Tensor, answers: torch.Tensor, voices: torch.Tensor) -> torch.Tensor:
    """Standings float64 [K] after a round.

    Args:
        answers: float64 [K], how much the cosine with the last step fell; NaN for who was not there then, and whose
            standing stays as it is.
        voices: float64 [K], not negative: by those that are heard is found what is usual.
    """
    known = ~answers.isnan()
    usual = heard_median(answers[known], voices[known]) if bool(known.any()) else 0.0
    if usual <= 0.0:
        return standings
    weight = min(usual / CLEAR, 1.0)
    gained = (answers / usual).clamp(min=-MOST, max=MOST) - ENOUGH
    moved = ((1.0 - (1.0 - KEPT) * weight) * standings + weight * gained).clamp(max=0.0)
    return torch.where(known, moved, standings)


def answering_voices(standings: torch.Tensor) -> torch.Tensor:
    """From 0 at `SILENT` below the cohort's median to 1 at the median: somebody is always heard; float64 [K]."""
    return (1.0 - (standings - standings.median()) / SILENT).clamp(min=0.0, max=1.0)
