"""The gate: whether a candidate may replace the current release. Pure.

Laws of the file: numbers in, a verdict out; a model that is worse than the current one, or whose quality
nobody knows, is held; every hold has one word from a closed set; no device alone releases or holds back anything
where three or more measured. Training goes on from a held head; only devices do not get it. Source: DESIGN.md
(Training head and release are two things).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cloud_server.influence import trimmed_mean
from wire.errors import ConfigurationError

SERVED: Final = "served_"
"""Prefix of what a device measured with the model that it serves, beside the candidate."""


class HoldReason(StrEnum):
    """Why a candidate was held back."""

    NOT_FINITE = "not_finite"
    TOO_LARGE = "too_large"
    NO_EVIDENCE = "no_evidence"
    TOO_FEW_EXAMPLES = "too_few_examples"
    OPERATOR_WORSE = "operator_worse"
    NO_GAIN = "no_gain"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePolicy:
    """What a candidate must reach.

    Attributes:
        min_gain: the least improvement of the deciding metric, in its own unit; 0 still asks for some.
        max_operator_drop: how much worse the metric on the operator's held-out data may be, in its own unit.
        max_bytes: largest int8 file; 0 for no limit.
        min_examples: fewest examples behind a federated metric for it to count.

    Raises:
        ConfigurationError: (operator) a value out of bounds; names it.
    """

    min_gain: float = 0.0
    max_operator_drop: float = 0.02
    max_bytes: int = 0
    min_examples: int = 1

    def __post_init__(self) -> None:
        for name in ("min_gain", "max_operator_drop", "max_bytes", "min_examples"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigurationError(f"gate: {name} is {value}", hint="use a number from 0 up", name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One model as it was measured, always through its int8 file.

    Attributes:
        federated: the task's metric on the devices' own windows, weighted by examples; None if nobody measured.
        federated_examples: examples behind it.
        operator: the same metric on the operator's held-out data; None without such data.
        size_bytes: of the int8 file.
    """

    federated: float | None
    federated_examples: int
    operator: float | None
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Pair:
    """One device's metric of the candidate and of the release that it serves, on the same windows.

    Attributes:
        weight: number of windows, capped: see `influence.capped_weights`.
    """

    candidate: float
    served: float
    weight: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's word: `reason` is None for a release. `gain` is that of the metric that decided."""

    reason: HoldReason | None
    gain: float = 0.0

    @property
    def is_released(self) -> bool:
        return self.reason is None


def judge(
    candidate: Judged,
    current: Judged | None,
    policy: GatePolicy,
    *,
    higher_is_better: bool,
    pairs: Sequence[Pair] = (),
) -> Verdict:
    """Decides.

    The federated metric decides where both models have one, else the operator's; the operator's is a guard
    in any case. Where devices measured both models, the gain is the trimmed mean of their differences, so that what
    one of them says is cut away or lies among what others say.

    Args:
        pairs: of every device that measured both.
        current: the current release; None where there is none yet: any sound candidate is better than that.
        higher_is_better: direction of the metric; an anomaly score is better when it is lower.
    """
    measures = [m for m in (candidate.federated, candidate.operator) if m is not None]
    if not all(map(math.isfinite, measures)):
        return Verdict(HoldReason.NOT_FINITE)
    if 0 < policy.max_bytes < candidate.size_bytes:
        return Verdict(HoldReason.TOO_LARGE)
    if not measures:
        return Verdict(HoldReason.NO_EVIDENCE)
    if candidate.federated is not None and candidate.federated_examples < policy.min_examples:
        return Verdict(HoldReason.TOO_FEW_EXAMPLES)
    if current is None:
        return Verdict(None)
    sign = 1.0 if higher_is_better else -1.0
    federated = _paired_gain(pairs, sign)
    if federated is None:
        federated = _gain(candidate.federated, current.federated, sign)
    operator = _gain(candidate.operator, current.operator, sign)
    if operator is not None and operator < -policy.max_operator_drop:
        return Verdict(HoldReason.OPERATOR_WORSE, operator)
    gain = operator if federated is None else federated
    if gain is None:
        return Verdict(HoldReason.NO_EVIDENCE)
    if gain <= 0 or gain < policy.min_gain:
        return Verdict(HoldReason.NO_GAIN, gain)
    return Verdict(None, gain)


def _paired_gain(pairs: Sequence[Pair], sign: float) -> float | None:
    """How much better the candidate is for the devices; None where no device measured both."""
    if not pairs:
        return None
    gains = [sign * (pair.candidate - pair.served) for pair in pairs]
    return trimmed_mean(gains, [pair.weight for pair in pairs])


def _gain(candidate: float | None, current: float | None, sign: float) -> float | None:
    """How much better the candidate is; None where there is nothing to compare."""
    if candidate is None or current is None or not math.isfinite(current):
        return None
    return sign * (candidate - current)
