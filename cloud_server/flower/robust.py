"""Robust rules as strategies of ours: FedAvg's planning and metrics, and an aggregate that a minority cannot steer.

They work in a stock ServerApp, where `configure_train` gives them the base, and in our driver, which sets it. Laws of
the file: replies are read as a stream, as often as a rule needs and never held together (a rule that needs them side by
side holds at most 64 rows); a reply that cannot be used is left out and ends nothing; only the default carries state
from round to round (`flower/state.py` keeps it); chance is the global `random`, which driver and grid seed. Sources:
cloud_server/aggregate/.
"""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from cloud_server.aggregate import rules
from cloud_server.aggregate.answers import TRACE_SIZE, Trace
from cloud_server.aggregate.clipped_mean import Rows, Shares, shares_of
from cloud_server.aggregate.sketch import Sketcher, unit_rows
from cloud_server.aggregate.voices import MOST_PEERS
from cloud_server.flower.cohort import Cohort, Vector, fits, flat, like
from cloud_server.influence import capped_weights
from wire.errors import ConfigurationError, RoundError
from wire.norm import l2_norm

MOST_STANDINGS = 100_000
_TRACE_SEED = 1
"""Always the same, so that rows of two rounds can be compared; who knows it gains its own answer to itself, no more."""
TrainReference = Callable[[ArrayRecord], ArrayRecord]
"""Trains on the operator's clean samples from the given arrays, and returns what came of them."""


class RobustStrategy(FedAvg):
    """What the rules share.

    Attributes:
        current_arrays: the base of the round.
        device: torch device of the rule, from `choose_device`; None for the CPU.
    """

    def __init__(self, **flower: Any) -> None:
        super().__init__(**flower)
        self.current_arrays: ArrayRecord | None = None
        self.device: rules.Device | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; the arrays are the base of what comes back."""
        self.current_arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The base moved by the rule's update; nothing without a usable reply.

        Raises:
            RoundError: the rule can make nothing of these replies, or there is no base.
        """
        if self.current_arrays is None:
            raise RoundError(f"{type(self).__name__} has no base: configure_train comes first")
        cohort = Cohort(self.current_arrays, replies, self.weighted_by_key)
        if not len(cohort):
            return None, None
        update = self._combine(cohort)
        metrics = self.train_metrics_aggr_fn(cohort.metrics(), self.weighted_by_key)
        return like(self.current_arrays, cohort.start + update), metrics

    @abstractmethod
    def _combine(self, cohort: Cohort) -> NDArray[np.floating]:
        """One update float32 or float64 [P] of all."""


class ClippedMean(RobustStrategy):
    """The default: the mean of updates that are cut to their median length, where those that are alike share a voice,
    and those that do not answer when the head moves, or speak of nothing, lose theirs (`aggregate/clipped_mean.py`).

    Args:
        max_weight_ratio: no reply weighs more than this many times the median weight. Who has much of what a backdoor
            asks for is hardly told from the honest, and moves the head by what it weighs.
        trimmed_share: of the voices, cut away on either side of every parameter; from 0 to below 0.5. It takes of a
            backdoor, of what only few devices know, and time: values are sorted.

    Attributes:
        way: float64 [P], where the head has been going: the last step; None before the first.
        standings: by node id, what a device's earlier updates say for it; at most `MOST_STANDINGS` devices.
        traces: by node id, of each update of the last round.
    """

    KEPT_WAY: ClassVar[float] = 0.0
    """Of `way`, from round to round."""

    def __init__(self, max_weight_ratio: float = 2.0, trimmed_share: float = 0.0, **flower: Any) -> None:
        super().__init__(**flower)
        if not (math.isfinite(max_weight_ratio) and max_weight_ratio >= 1.0):
            raise ConfigurationError(
                f"max_weight_ratio is {max_weight_ratio}",
                hint="use a number from 1 up",
                key="max_weight_ratio",
            )
        self.max_weight_ratio = max_weight_ratio
        self.trimmed_share = _checked_share(trimmed_share)
        self.way: NDArray[np.float64] | None = None
        self.standings: dict[int, float] = {}
        self.traces: dict[int, Trace] = {}

    def fold(
        self, sent: Callable[[], Iterable[tuple[int, int, Vector]]], *, size: int, seed: int
    ) -> tuple[NDArray[np.float64], list[int]]:
        """The step of a cohort, float64 [size], and the capped weights of its replies.

        The standings and traces of the senders move on; the way does not.

        Args:
            sent: gives node id, weight and float32 [size] of each reply, at least one; asked twice.
            seed: draws the sketches and, above 64 replies, the buckets.
        """
        shares, weights = self._weigh(sent(), size, seed)
        rows = Rows(shares, size, seed, device=self.device)
        for number, (_, _, update) in enumerate(sent()):
            rows.add(number, update)
        return rows.step(self.trimmed_share), weights

    def _weigh(
        self, sent: Iterable[tuple[int, int, Vector]], size: int, seed: int
    ) -> tuple[Shares, list[int]]:
        sketcher = Sketcher(size, seed, device=self.device)
        tracer = Sketcher(size, _TRACE_SEED, sums=TRACE_SIZE, device=self.device)
        nodes, claimed, lengths, sketches, rows = [], [], [], [], []
        for node, weight, update in sent:
            nodes.append(node)
            claimed.append(weight)
            lengths.append(l2_norm(update))
            sketches.append(sketcher.sketch(update))
            # Of a large cohort nobody's own part is worth the memory.
            if len(nodes) <= MOST_PEERS:
                rows.append(unit_rows([tracer.sketch(update)])[0].float().cpu().numpy())
        if len(nodes) > MOST_PEERS:
            rows = [np.empty(0, np.float32)] * len(nodes)
        weights = capped_weights(claimed, self.max_weight_ratio)
        reference = self._reference()
        shares = shares_of(
            sketches,
            lengths,
            weights,
            way=None if self.way is None else sketcher.sketch(self.way),
            standings=[self.standings.get(node, 0.0) for node in nodes],
            headings=self._headings(nodes, rows),
            seed=seed,
            reference=None if reference is None else sketcher.sketch(reference),
        )
        self._note(nodes, shares.standings)
        # One reply may be what was made of many a moment ago: their traces are what the next round is measured by.
        if len(nodes) > 1 and reference is None:
            self.traces = dict(zip(nodes, map(Trace, shares.headings, shares.own, rows), strict=True))
        return shares, weights

    def _headings(self, nodes: Sequence[int], rows: Sequence[Vector]) -> list[float | None]:
        """What the headings of this round are held against; None for who was not in the last one."""
        return [
            self.traces[node].of_the_others(row) if node in self.traces else None
            for node, row in zip(nodes, rows, strict=True)
        ]

    def _reference(self) -> NDArray[np.floating] | None:
        """Where the operator's own samples go, float32 [P]; None without such samples."""
        return None

    def _note(self, nodes: Sequence[int], standings: Sequence[float]) -> None:
        for node, standing in zip(nodes, standings, strict=True):
            self.standings.pop(node, None)  # the newest stand last, the oldest are forgotten
            if standing:
                self.standings[node] = standing
        while len(self.standings) > MOST_STANDINGS:
            del self.standings[next(iter(self.standings))]

    def _combine(self, cohort: Cohort) -> NDArray[np.floating]:
        step, _ = self.fold(cohort.sent, size=cohort.start.size, seed=random.getrandbits(63))
        self.way = step if self.way is None else self.KEPT_WAY * self.way + step
        return step


class FLTrust(ClippedMean):
    """The clipped mean of those who go where the operator's own clean samples go: it stands a minority of any kind and,
    while the samples resemble the fleet's, far more of those who pull elsewhere.

    Args:
        train_reference: trains on those samples; our driver sets it, a stock ServerApp gives it.

    Its `way` is a decayed sum of all steps, and standings are by that and by the samples.
    """

    KEPT_WAY: ClassVar[float] = 0.7

    def __init__(self, train_reference: TrainReference | None = None, **ours: Any) -> None:
        super().__init__(**ours)
        self.train_reference = train_reference

    def _reference(self) -> NDArray[np.floating] | None:
        if self.train_reference is None or self.current_arrays is None:
            raise RoundError("FLTrust has no samples of the operator's", hint="give train_reference")
        trained = self.train_reference(self.current_arrays)
        if not fits(trained, self.current_arrays):
            raise RoundError("the reference of FLTrust has other arrays than the model")
        reference = flat(trained) - flat(self.current_arrays)
        if not reference.any():
            raise RoundError("the operator's samples moved nothing: there is nothing to trust")
        return reference


class RowRule(RobustStrategy):
    """A rule that needs the updates side by side, as at most 64 rows."""

    def _combine(self, cohort: Cohort) -> NDArray[np.floating]:
        return rules.aggregate_rows(
            cohort.updates(),
            len(cohort),
            cohort.start.size,
            self._rule(cohort),
            seed=random.getrandbits(63),
            device=self.device,
        )

    @abstractmethod
    def _rule(self, cohort: Cohort) -> rules.Rule:
        """The rule for this cohort."""


class GeometricMedian(RowRule):
    """The point with the smallest sum of distances to all updates."""

    def _rule(self, cohort: Cohort) -> rules.Rule:
        return rules.GEOMETRIC_MEDIAN


class CoordinateMedian(RowRule):
    """The median of every parameter on its own."""

    def _rule(self, cohort: Cohort) -> rules.Rule:
        return rules.MEDIAN


class TrimmedMean(RowRule):
    """The mean of every parameter without its smallest and largest values.

    Args:
        trimmed_share: of the replies, on either side; from 0 to below 0.5.
    """

    def __init__(self, trimmed_share: float = 0.2, **flower: Any) -> None:
        super().__init__(**flower)
        self.trimmed_share = _checked_share(trimmed_share)

    def _rule(self, cohort: Cohort) -> rules.Rule:
        return rules.trimmed(self.trimmed_share)


class RobustMultiKrum(RowRule):
    """The mean of the updates with the closest neighbours.

    Args:
        attacker_share: how many of the replies may be false; from 0 to below 0.5.
    """

    def __init__(self, attacker_share: float = 0.2, **flower: Any) -> None:
        super().__init__(**flower)
        if not 0.0 <= attacker_share < 0.5:
            raise ConfigurationError(
                f"an attacker share of {attacker_share} leaves no majority",
                hint="give 0 ≤ attacker_share < 0.5",
                key="attacker_share",
            )
        self.attacker_share = attacker_share

    def _rule(self, cohort: Cohort) -> rules.Rule:
        return rules.krum(len(cohort), self.attacker_share)


ROBUST: dict[str, type[RobustStrategy]] = {
    kind.__name__: kind
    for kind in (ClippedMean, GeometricMedian, CoordinateMedian, TrimmedMean, RobustMultiKrum, FLTrust)
}


def _checked_share(share: float) -> float:
    if not 0.0 <= share < 0.5:
        raise ConfigurationError(
            f"a trimmed share of {share} leaves nothing",
            hint="give 0 ≤ trimmed_share < 0.5",
            key="trimmed_share",
        )
    return share
