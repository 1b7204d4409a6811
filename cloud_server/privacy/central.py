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

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from cloud_server.privacy.budget import Budget, Charged
from cloud_server.rounds.ports import Aggregate, Measured, Outline, Plan, Replies, Reply, Strategy, Vector
from wire.checkpoint import Checkpoint
from wire.discrete_gaussian import WordStream, discrete_gaussian
from wire.errors import ConfigurationError
from wire.norm import l2_norm

SIGMA = 2**24
"""Standard deviation of the noise, in steps of the lattice."""


@dataclass(frozen=True, slots=True)
class Lattice:
    """The integers that clipped updates are rounded to.

    Attributes:
        step: what one of them stands for.
        radius: no rounded update is longer than this (L2), in steps; σ over it is the noise multiplier.
    """

    step: float
    radius: Fraction

    @classmethod
    def of(cls, clipping_norm: float, noise_multiplier: float, size: int) -> Lattice:
        """The lattice on which `SIGMA` is the noise that was asked for.

        Args:
            size: P; rounding to the nearest lengthens an update by at most √P / 2 steps, which the step makes room for.

        Raises:
            ConfigurationError: (operator) so much noise on so many parameters that nothing of an update is left.
        """
        radius = Fraction(SIGMA) / Fraction(noise_multiplier)
        room = float(radius) - math.sqrt(size) / 2 - 1
        if room < 1:
            raise ConfigurationError(
                f"a noise multiplier of {noise_multiplier:g} is too much for {size} parameters",
                hint="lower privacy.noise_multiplier",
            )
        return cls(clipping_norm / room, radius)

    def rounded(self, update: Vector, clipping_norm: float) -> NDArray[np.int64]:
        """The update, float32 [P], clipped and rounded: int64 [P], never longer than the radius."""
        norm = l2_norm(update)
        scale = min(1.0, clipping_norm / norm) if norm > 0 else 0.0
        limit = math.floor(self.radius**2)
        while True:
            found = np.rint(update.astype(np.float64) * (scale / self.step)).astype(np.int64)
            if int(np.dot(found, found)) <= limit:
                return found
            # Only a rounding of `norm` or `step` comes here; the bound itself is not negotiable.
            scale *= 1.0 - 2.0**-20


def sample_cohort(secret: bytes, node_ids: Iterable[int], rate: float) -> tuple[int, ...]:
    """Poisson sampling: each node with probability `rate`, whatever becomes of the others; nobody is legal.

    Args:
        secret: of the round; who does not know it cannot tell who was asked.
    """
    threshold = int(Fraction(rate) * 2**64)
    return tuple(node_id for node_id in sorted(node_ids) if _word(secret, node_id) < threshold)


class CentralPrivacy:
    """Wraps the strategy of a run; `cloud_server.rounds.ports.Strategy`.

    Args:
        inner: gets one update for a round, the noisy mean. It must be a function of a weighted mean.
        size: P.

    Raises:
        ConfigurationError: (operator) noise that the lattice has no room for.
    """

    def __init__(self, inner: Strategy, budget: Budget, size: int) -> None:
        self._inner = inner
        self._budget = budget
        self._size = size
        Lattice.of(budget.plan.clipping_norm, budget.plan.noise_multiplier, size)

    def plan_train(self, round_number: int, base: Checkpoint, node_ids: Iterable[int], seed: int) -> Plan:
        """Draws the cohort of the round that the budget has prepared."""
        listed = list(node_ids)
        config = self._inner.plan_train(round_number, base, listed, seed).config
        plan = self._budget.plan
        cohort = sample_cohort(self._budget.opening.secret, listed, plan.sampling_rate)
        return Plan(cohort, {**config, "clipping_norm": plan.clipping_norm})

    def aggregate_train(self, round_number: int, base: Checkpoint, replies: Replies, seed: int) -> Aggregate:
        """Adds the noise of the round's charge, and gives the mean to the inner strategy.

        Raises:
            RoundError: the round was not charged, or the inner strategy failed.
        """
        mean = noisy_mean(replies, self._budget.charged(round_number), self._size)
        return self._inner.aggregate_train(round_number, base, _One(mean, base.buffers), seed)

    def plan_evaluate(self, round_number: int, head: Checkpoint, node_ids: Iterable[int], seed: int) -> Plan:
        """Nobody: what devices measure on their own data would be told without noise."""
        return Plan((), {})

    def aggregate_evaluate(self, round_number: int, measured: list[Measured]) -> Mapping[str, float]:
        return {}

    def export_state(self) -> Mapping[str, bytes]:
        """The inner strategy's: it has seen noisy means only."""
        return self._inner.export_state()

    def import_state(self, state: Mapping[str, bytes]) -> None:
        self._inner.import_state(state)


def noisy_mean(replies: Replies, charged: Charged, size: int) -> Vector:
    """The sum of the clipped updates with the noise of the charge, over the expected cohort: float32 [P].

    The same for the same replies and secret.
    """
    charge = charged.charge
    lattice = Lattice.of(charge.clipping_norm, charge.noise_multiplier, size)
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

    def outlines(self) -> Sequence[Outline]:
        return [Outline(l2_norm(self._mean), 1)]

    def __iter__(self) -> Iterator[Reply]:
        yield Reply(
            node_id=1,
            num_examples=1,
            metrics={},
            update=self._mean.copy(),
            buffers=self._buffers.copy(),
            norm=l2_norm(self._mean),
        )


def _word(secret: bytes, node_id: int) -> int:
    """A uniform number below 2**64 for a node."""
    digest = hashlib.sha256(b"shoal cohort\0" + secret + node_id.to_bytes(8, "big", signed=True)).digest()
    return int.from_bytes(digest[:8], "big")
