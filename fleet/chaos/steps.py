"""How the step of a round follows from its updates, one way for each sort of run that histories play.

Laws of the file: in float64 and apart from the product's folds, but for the robust rule, whose own aggregation runs a
second time with a state that no crash touches. Sources: Hsu et al., arXiv:1909.06335 (FedAvgM); docs/protocol.md,
clause 13 (sums under masks); cloud_server/privacy/central.py (noise on a sum); Nguyen et al., arXiv:2106.06639, and
Xie et al., arXiv:1903.03934 (stale steps).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np

from cloud_server.flower.driver import StrategyDriver
from cloud_server.flower.strategies import build_strategy
from cloud_server.privacy.central import SIGMA, lattice_for
from cloud_server.privacy.plan import PrivacyPlan
from cloud_server.rounds.draws import draw_seed
from cloud_server.rounds.ports import Reply
from fleet.chaos.fold_check import Folded, Made, NotAFoldError, Step, Vector, cut, mean
from fleet.chaos.plays import STALENESS_EXPONENT, Play
from fleet.chaos.privacy_ledger import PrivacyLedger
from wire.checkpoint import Checkpoint
from wire.codec import decode
from wire.discrete_gaussian import WordStream, discrete_gaussian
from wire.lattice import Lattice
from wire.manifest import Manifest
from wire.norm import l2_norm
from wire.ring import ring_of


class Averaging:
    """The mean by examples, and a momentum of the server.

    Args:
        momentum: 0 for plain averaging.
        exponent: by which stale updates count for less.
    """

    def __init__(self, momentum: float = 0.0, exponent: float = 0.0) -> None:
        self._momentum = momentum
        self._exponent = exponent
        self._moving: Vector | None = None

    def of(self, folded: Folded, base: Checkpoint, replies: Sequence[Made]) -> Vector:
        if not replies:
            raise NotAFoldError("nothing was folded")
        step = mean(replies, min(folded.norm_bound, folded.clipping_norm), self._exponent)
        if self._moving is not None:
            step = step + self._momentum * self._moving
        self._moving = step
        return step


class Summing:
    """The mean of the numbers that were masked, with what noise devices added to them."""

    def of(self, folded: Folded, base: Checkpoint, replies: Sequence[Made]) -> Vector:
        if not replies:
            raise NotAFoldError("nothing was folded")
        total = np.zeros(base.params.size, np.float64)
        for each in replies:
            total += _number(each)
        return total / len(replies)


def _number(made: Made) -> Vector:
    """What one device's numbers stand for, float64 [P]."""
    draft = made.draft
    if draft is None or draft.order.ring_terms is None:
        raise NotAFoldError("an update came without masks")
    terms = draft.order.ring_terms
    if terms.noise is None:
        ring = ring_of(terms)
        return draft.values.astype(np.float64) * ring.step - ring.bound
    lattice = Lattice.of(terms.noise.clipping_norm, Fraction(terms.noise.radius), len(draft.values))
    return draft.values.view("<i4").astype(np.float64) * lattice.step


class Noising:
    """Clipped updates and the noise of the round's charge, over the expected cohort.

    Args:
        secret_of: what a round was charged with, by the ledger's own books.
        population: of the charge of a round.
    """

    def __init__(
        self, plan: PrivacyPlan, secret_of: Callable[[int], bytes | None], population: Callable[[int], int]
    ) -> None:
        self._plan = plan
        self._secret_of = secret_of
        self._population = population

    def of(self, folded: Folded, base: Checkpoint, replies: Sequence[Made]) -> Vector:
        plan, secret = self._plan, self._secret_of(folded.round_number)
        if secret is None:
            raise NotAFoldError("it was not charged for its noise")
        size = base.params.size
        total = np.zeros(size, np.float64)
        for each in replies:
            total += cut(_decoded(each), plan.clipping_norm)
        noise = discrete_gaussian(WordStream(secret, b"central noise"), SIGMA, size)
        total += noise * lattice_for(plan.clipping_norm, plan.noise_multiplier, size).step
        expected: float = max(1.0, plan.sampling_rate * self._population(folded.round_number))
        return total / expected


class Robust:
    """The robust default once more, by itself: its state goes from fold to fold and is never written or read back."""

    def __init__(self, manifest: Manifest, strategy: str) -> None:
        self._driver = StrategyDriver(build_strategy(strategy, {}), manifest.params)

    def of(self, folded: Folded, base: Checkpoint, replies: Sequence[Made]) -> Vector:
        if not replies:
            raise NotAFoldError("nothing was folded")
        stream = _Stream(replies, min(folded.norm_bound, folded.clipping_norm))
        seed = draw_seed(folded.seed, "aggregate")
        moved = self._driver.aggregate_train(folded.round_number, base, stream, seed)
        return moved.params.astype(np.float64) - base.params


class _Stream:
    """What devices made, as a strategy is given it; as often as it wants."""

    def __init__(self, replies: Sequence[Made], bound: float) -> None:
        self._replies = replies
        self._bound = bound

    def __len__(self) -> int:
        return len(self._replies)

    def __iter__(self) -> Iterator[Reply]:
        for each in self._replies:
            update = each.update
            vector = _decoded(each)
            yield Reply(
                node_id=each.node_id,
                num_examples=update.num_examples,
                metrics=update.metrics,
                update=cut(vector, self._bound).astype(np.float32),
                buffers=np.frombuffer(update.buffers, "<f2").astype(np.float32),
                norm=l2_norm(vector.astype(np.float32)),
            )


def _decoded(made: Made) -> Vector:
    update = made.update
    return decode(update.payload, update.codec, update.params_size).astype(np.float64)


def step_of(play: Play, manifest: Manifest, privacy: PrivacyLedger | None) -> Step:
    """How a play's steps follow from its updates."""
    if play.masks != "plain":
        return Summing()
    if play.privacy is not None and privacy is not None:
        return Noising(play.privacy, privacy.secret_of, privacy.population_of)
    if play.strategy in ("FedAvg", "FedAvgM"):
        return Averaging(play.momentum, STALENESS_EXPONENT if play.is_buffered else 0.0)
    return Robust(manifest, play.strategy)
