"""The default rule: a mean of updates cut to their median length, in which a voice has to be one's own, to speak of
what others speak of, and to answer when the head moves.

Who counts how much follows from lengths, weights and sketches (`sketch.py`) of the updates: angles within the cohort
say who is alike and who is noise (`voices.py`), how the angle with the head's last step has changed says who learns,
and adds up to a device's *standing* (`answers.py`). Of a device that was not in the round before nobody knows that: it
is heard as far as it goes along with the others, or with the head's way, if those that are heard do (`standings.py`).
FLTrust is the same mean with a root of trust: its standings are sums of cosines with the head's way and with where the
operator's own samples lead, which in the first round decide alone who may speak: no majority is needed.

Cutting to the median shortens the step where honest devices have much or little to learn, and attackers that are not
heard leave room: the step gets back what was lost by the cut to one median and not to `LENGTH_ROOM` of them. On demand
the smallest and the largest values of each parameter are cut away, by the voices behind them; that shortens the step
where honest devices differ, so it is made to reach as far along the mean of the same voices as that mean (at most
`MOST_AGAIN` times as long as it was).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cloud_server.aggregate.answers import answered, answering_voices
from cloud_server.aggregate.clipping import clip_factors, median_length
from cloud_server.aggregate.coordinate import heard_trimmed_mean
from cloud_server.aggregate.gram import weighted_mean
from cloud_server.aggregate.rows import bucket_count
from cloud_server.aggregate.sketch import unit_rows
from cloud_server.aggregate.standings import accord, contradiction, fleets_voices, moved, standing_voices
from cloud_server.aggregate.voices import FEWEST, drawn_peers, kindred_voices, shared_voices, with_the_others
from wire.errors import RoundError

LENGTH_ROOM = 2.0
MOST_AGAIN = 3.0
"""What trimming took of the length is given back up to here: where it took more, there is no common direction."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How a round's updates are to be added up.

    Attributes:
        voices: what each counts, from 0 up; their sum is 1.
        cuts: what each is multiplied with, in (0, 1].
        stretch: what the step is multiplied with, from 1 to `LENGTH_ROOM`.
        standings: of the devices after this round.
        headings: cosine of each update with the step, before anything is trimmed.
        own: what of that is the update's own part in the step.
    """

    voices: list[float]
    cuts: list[float]
    stretch: float
    standings: list[float]
    headings: list[float]
    own: list[float]


def shares_of(
    sketches: Sequence[torch.Tensor],
    lengths: Sequence[float],
    weights: Sequence[int],
    *,
    way: torch.Tensor | None,
    standings: Sequence[float],
    headings: Sequence[float | None] | None = None,
    seed: int,
    reference: torch.Tensor | None = None,
) -> Shares:
    """Weighs a cohort.

    Args:
        sketches: of the updates, float64 [D] each; at least one.
        lengths: L2, of the updates.
        weights: from 1 up, capped.
        way: sketch of where the head has been going; None in the first round.
        standings: of the devices before this round; 0 for a new one.
        headings: cosine of each device's update of the round before with that round's step, which `way` is then, less
            what its own part in the step makes of the difference; None for who was not there, or where nobody was.
        seed: of the round; draws whom updates are compared with in a large cohort.
        reference: sketch of where the operator's own samples go, which then decides; None without such samples.

    Raises:
        RoundError: nobody goes where the operator's samples do.
    """
    units = unit_rows(sketches)
    real, voices, stood, cuts, roomy = (
        torch.tensor(values, dtype=torch.float64, device=units.device)
        for values in (
            lengths,
            weights,
            standings,
            clip_factors(lengths),
            clip_factors(lengths, LENGTH_ROOM * median_length(lengths)),
        )
    )
    peers = drawn_peers(len(units), seed).to(units.device)
    cosines = units @ units[peers].T
    kindred = kindred_voices(cosines, peers)
    voices = voices * kindred * shared_voices(cosines, peers, kindred)
    short = real * cuts
    ahead = None if way is None else units @ unit_rows([way])[0]
    tiny = torch.finfo(torch.float64).tiny
    if reference is not None:
        trusted = unit_rows([reference])[0]
        against = 0.0 if way is None else contradiction(unit_rows([way])[0], trusted)
        standing = _trusted_standings(stood, units, short, voices, ahead, units @ trusted, against)
        heard = voices * standing_voices(standing)
        if not float(heard @ short) > 0.0:
            raise RoundError("no update goes where the operator's samples do")
    else:
        before = torch.tensor(
            [torch.nan if each is None else each for each in headings or [None] * len(units)],
            dtype=torch.float64,
            device=units.device,
        )
        standing, heard = _answering(stood, units, short, voices, ahead, before)
    stretch = float(heard @ (real * roomy)) / max(float(heard @ short), tiny)
    step = (heard * short) @ units
    length = torch.linalg.vector_norm(step).clamp(min=tiny)
    voices = heard / heard.sum()
    return Shares(
        voices.tolist(),
        cuts.tolist(),
        max(stretch, 1.0),
        standing.tolist(),
        (units @ (step / length)).tolist(),
        (heard * short / length).tolist(),
    )


def _answering(
    stood: torch.Tensor,
    units: torch.Tensor,
    short: torch.Tensor,
    voices: torch.Tensor,
    ahead: torch.Tensor | None,
    before: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standings by the answers, and what each is heard; who was not there is heard as far as it goes along.

    Args:
        ahead: cosines with the last step; None in the first round.
        before: the same of the round before; NaN for who was not there.
    """
    # One or two replies are a mean already, or nobody's: they say nothing of anybody.
    if len(stood) < FEWEST:
        return stood, voices * answering_voices(stood)
    if ahead is None:
        standing, along = stood, with_the_others(units, short, voices)
    else:
        standing, along = answered(stood, before - ahead, voices * answering_voices(stood)), ahead
    heard = voices * answering_voices(standing)
    going = fleets_voices(accord(along, heard) * along)
    return standing, heard * torch.where(before.isnan(), going, 1.0)


def _trusted_standings(
    stood: torch.Tensor,
    units: torch.Tensor,
    short: torch.Tensor,
    voices: torch.Tensor,
    ahead: torch.Tensor | None,
    trusted: torch.Tensor,
    against: float,
) -> torch.Tensor:
    """By the way of the head and by the operator's samples, which decide where the two contradict each other: whoever
    took the head along once would otherwise be heard for having done so.

    Args:
        ahead: cosines with the way; None in the first round.
        trusted: cosines with the reference.
        against: how far the way contradicts the reference, from 0 to 1.
    """
    heard = voices * standing_voices(stood)
    weight = max(accord(trusted, heard), against)
    if ahead is not None:
        return moved(stood, [(ahead, (1.0 - against) * accord(ahead, heard)), (trusted, weight)])
    # Where most of the fleet turns against the samples from the start, the samples are right.
    weight = max(weight, accord(-trusted, heard))
    heard = voices * standing_voices(moved(stood, [(trusted, weight)]))
    others = with_the_others(units, short, heard)
    return moved(stood, [(others, accord(others, heard)), (trusted, weight)])


class Rows:
    """Updates side by side as they are heard: at most `MAX_ROWS` rows, above that the means of random buckets.

    Args:
        shares: of the cohort.
        seed: draws which updates share a bucket.
    """

    def __init__(self, shares: Shares, size: int, seed: int, *, device: torch.device | None = None) -> None:
        count = len(shares.voices)
        rows = bucket_count(count)
        self._places = np.arange(count) % rows
        if rows < count:
            np.random.default_rng(seed).shuffle(self._places)
        self._shares = shares
        self._matrix = torch.zeros((rows, size), dtype=torch.float32, device=device)
        self._voices = np.zeros(rows)
        np.add.at(self._voices, self._places, shares.voices)

    def add(self, number: int, update: NDArray[np.float32]) -> None:
        """Adds the update float32 [size] with this place in the cohort; it is read before this returns."""
        voice = self._shares.voices[number]
        if voice > 0.0:
            row = int(self._places[number])
            source = update if update.flags.writeable else update.copy()
            part = voice / self._voices[row] * self._shares.cuts[number]
            self._matrix[row].add_(torch.from_numpy(source).to(self._matrix.device), alpha=part)

    def step(self, trimmed_share: float) -> NDArray[np.float64]:
        """The cohort's step, float64 [size]."""
        voices = torch.from_numpy(self._voices).to(self._matrix.device)
        mean = weighted_mean(self._matrix, voices).double()
        if not trimmed_share:
            untrimmed: NDArray[np.float64] = (mean * self._shares.stretch).cpu().numpy()
            return untrimmed
        step = heard_trimmed_mean(self._matrix, voices, trimmed_share).double()
        along = float(step @ mean)
        again = float(mean @ mean) / along if along > 0.0 else 0.0
        whole: NDArray[np.float64] = (step * (min(again, MOST_AGAIN) * self._shares.stretch)).cpu().numpy()
        return whole
