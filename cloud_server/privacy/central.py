"""Central differential privacy: a Poisson-sampled cohort, a fixed clip, uniform weights, and noise on the sum.

    head = base + step · (Σ round(clip(update, C) / step) + discrete Gaussian) / (q · N)

Laws of the file: sum and noise are integers, so that no rounding of the machine tells anything (Mironov 2012); the
noise is that of the charge, whatever arrived: with no reply at all the head moves by noise alone, because an aggregate
that comes only when enough replied would tell how many did; the divisor is the *expected* cohort, never the real one;
of a reply nothing is looked at but its update. Whatever strategy gets the noisy mean is post-processing. Source:
McMahan et al., "Learning differentially private recurrent language models" (2018), fixed-denominator estimator;
Kairouz, Liu, Steinke, "The distributed discrete Gaussian mechanism" (2021), for the lattice.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from cloud_server.privacy.budget import Budget, Charged
from cloud_server.privacy.sampling import PrivateStrategy
from cloud_server.rounds.ports import Aggregate, Replies, Reply, Strategy, Vector
from wire.checkpoint import Checkpoint
from wire.discrete_gaussian import WordStream, discrete_gaussian
from wire.lattice import Lattice
from wire.norm import l2_norm

SIGMA = 2**24
"""Standard deviation of the noise, in steps of the lattice."""


def lattice_for(clipping_norm: float, noise_multiplier: float, size: int) -> Lattice:
    """The lattice on which `SIGMA` is the noise that was asked for; raises `ConfigurationError` as `Lattice.of`."""
    return Lattice.of(clipping_norm, Fraction(SIGMA) / Fraction(noise_multiplier), size)


class CentralPrivacy(PrivateStrategy):
    """Adds the noise to what the strategy of a run is given.

    Args:
        inner: gets one update for a round, the noisy mean. It must be a function of a weighted mean.
        size: P.

    Raises:
        ConfigurationError: (operator) noise that the lattice has no room for.
    """

    def __init__(self, inner: Strategy, budget: Budget, size: int) -> None:
        super().__init__(inner, budget)
        self._size = size
        lattice_for(budget.plan.clipping_norm, budget.plan.noise_multiplier, size)

    def aggregate_train(self, round_number: int, base: Checkpoint, replies: Replies, seed: int) -> Aggregate:
        """Adds the noise of the round's charge, and gives the mean to the inner strategy.

        Raises:
            RoundError: the round was not charged, or the inner strategy failed.
        """
        mean = noisy_mean(replies, self._budget.charged(round_number), self._size)
        return self._inner.aggregate_train(round_number, base, _One(mean, base.buffers), seed)


def noisy_mean(replies: Replies, charged: Charged, size: int) -> Vector:
    """The sum of the clipped updates with the noise of the charge, over the expected cohort: float32 [P].

    The same for the same replies and secret.
    """
    charge = charged.charge
    lattice = lattice_for(charge.clipping_norm, charge.noise_multiplier, size)
    total = np.zeros(size, np.int64)
    for reply in replies:
        total += lattice.rounded(reply.update, charge.clipping_norm)
    total += discrete_gaussian(WordStream(charged.secret, b"central noise"), SIGMA, size)
    expected = max(1.0, charge.sampling_rate * charge.population)
    mean: Vector = (total * (lattice.step / expected)).astype(np.float32)
    return mean


class _One:
    """The noisy mean as the only reply of a round."""

    def __init__(self, mean: Vector, buffers: Vector) -> None:
        self._mean = mean
        self._buffers = buffers

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Reply]:
        yield Reply(
            node_id=1,
            num_examples=1,
            metrics={},
            update=self._mean.copy(),
            buffers=self._buffers.copy(),
            norm=l2_norm(self._mean),
        )
