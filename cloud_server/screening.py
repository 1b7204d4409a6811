"""Whether a reply may reach an aggregate: pure checks, before any strategy sees a number.

Laws of the file: pure; a refusal is one word of `Refusal` and nothing else; no bytes a device sends end a
round or raise anything but what these functions return. What passes is finite, of the right size, on the
right base, clipped to the round's norm and weighs no more than the device's enrolled cap. Source:
DESIGN.md, law 6.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from wire.codec import decode
from wire.errors import PeerError
from wire.mask_terms import RING_BYTES
from wire.messages import Evaluation, Update
from wire.norm import l2_norm


class Refusal(StrEnum):
    """Why a reply was refused: the closed set of reasons that receipts, books and metrics use."""

    MALFORMED = "malformed"
    UNKNOWN_ORDER = "unknown_order"
    FOREIGN_ORDER = "foreign_order"
    FOREIGN_UPDATE = "foreign_update"
    WRONG_KIND = "wrong_kind"
    WRONG_ROUND = "wrong_round"
    WRONG_MODEL = "wrong_model"
    WRONG_BASE = "wrong_base"
    WRONG_SIZE = "wrong_size"
    WRONG_CODEC = "wrong_codec"
    NOT_DECODABLE = "not_decodable"
    NOT_FINITE = "not_finite"
    MISSING_METRIC = "missing_metric"
    IMPLAUSIBLE = "implausible"
    QUARANTINED = "quarantined"
    REVOKED = "revoked"
    ALREADY_ANSWERED = "already_answered"
    REPLAYED = "replayed"
    ROUND_CLOSED = "round_closed"
    TOO_STALE = "too_stale"


LATE = frozenset({Refusal.ROUND_CLOSED, Refusal.TOO_STALE})
"""Refusals that say nothing against the device: the reply was sound, and too late."""

TRAIN_METRICS: Final = frozenset({"loss_first", "loss_last", "update_norm"})
"""What every update says of itself: strategies weigh by it, and one that lacks it would end their round."""
MAX_METRIC: Final = 1e12
"""No loss, norm or accuracy is larger; powers and sums of such numbers are still finite."""
RUNNING_ROUNDS: Final = 5
"""Rounds whose medians decide how long an update may be."""
# Below this a float32 factor has lost digits of its own.
_TINY: Final = 2.0**-100


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What an order asked for: the reply must fit it.

    Attributes:
        device: who was asked.
        base_sha256: 32 bytes, the checkpoint that the order named.
        graphs_sha256: 32 bytes, the model.
        max_examples: the device's enrolled cap on the weight of one reply.
        clipping_norm: bound on the L2 norm of an update; only for training.
        codecs: the encodings that the round allows; only for training.
        metrics: names that the reply must have.
        keeps_metrics: whether the books keep what the device says of itself beside its update.
        shares: those of the metrics that are no more than 1, such as an accuracy.
        variances: [start, end) of the buffers that are variances: one below zero makes a model answer NaN.
    """

    device: str
    kind: str
    run: str
    round_number: int
    base_sha256: bytes
    graphs_sha256: bytes
    params_size: int
    buffers_size: int
    max_examples: int
    clipping_norm: float = math.inf
    codecs: frozenset[str] = frozenset()
    metrics: frozenset[str] = frozenset()
    keeps_metrics: bool = True
    shares: frozenset[str] = frozenset()
    variances: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Screened:
    """An update that may be folded.

    Attributes:
        update: float32 [P], local − global, its norm at most the clipping norm.
        buffers: float32 [Q], the local statistics themselves.
        num_examples: the weight, capped.
        norm: L2 norm before clipping.
    """

    update: NDArray[np.float32]
    buffers: NDArray[np.float32]
    num_examples: int
    norm: float


def screen_update(update: Update, device: str, expected: Expected) -> Screened | Refusal:
    """Checks one training reply, and decodes, clips and caps it."""
    refusal = _check_order(update, device, expected, "train")
    if refusal is not None:
        return refusal
    if update.codec not in expected.codecs:
        return Refusal.WRONG_CODEC
    if update.params_size != expected.params_size or len(update.buffers) != 2 * expected.buffers_size:
        return Refusal.WRONG_SIZE
    return _check_metrics(update.metrics, expected, expected.metrics) or decode_update(update, expected)


def screen_masked(update: Update, device: str, expected: Expected) -> int | Refusal:
    """Checks what can be checked of a reply under masks; returns its weight.

    Every number of the ring is valid, and none says anything: what bounds such an update is the device that clips it,
    and after the sum the round's own checks.
    """
    refusal = _check_order(update, device, expected, "train")
    if refusal is not None:
        return refusal
    if update.codec not in expected.codecs:
        return Refusal.WRONG_CODEC
    size = expected.params_size
    if update.params_size != size or len(update.payload) != size * RING_BYTES[update.codec] or update.buffers:
        return Refusal.WRONG_SIZE
    return 1


def screen_evaluation(evaluation: Evaluation, device: str, expected: Expected) -> int | Refusal:
    """Checks one evaluation; returns its weight, capped."""
    refusal = _check_order(evaluation, device, expected, "evaluate")
    if refusal is not None:
        return refusal
    # Losses, errors and accuracies: none of them is below zero.
    refusal = _check_metrics(evaluation.metrics, expected, evaluation.metrics)
    if refusal is not None:
        return refusal
    return min(evaluation.num_examples, expected.max_examples)


def decode_update(update: Update, expected: Expected) -> Screened | Refusal:
    """The numbers of an update whose order and sizes were checked; the same each time (the fold decodes
    again)."""
    try:
        vector = decode(update.payload, update.codec, expected.params_size)
    except PeerError:
        return Refusal.NOT_DECODABLE
    if vector.size != expected.params_size:
        return Refusal.WRONG_SIZE
    buffers = np.frombuffer(update.buffers, dtype="<f2").astype(np.float32)
    if not (np.isfinite(vector).all() and np.isfinite(buffers).all()):
        return Refusal.NOT_FINITE
    if any((buffers[start:end] < 0.0).any() for start, end in expected.variances):
        return Refusal.IMPLAUSIBLE
    norm = l2_norm(vector)
    vector = _clipped(vector, norm, expected.clipping_norm)
    return Screened(vector, buffers, min(update.num_examples, expected.max_examples), norm)


def norm_median(norms: Sequence[float]) -> float:
    """How long the updates of one round were; 0 without one that moved anything.

    The lower one of two in the middle: where half of very few devices lie, the longer lie must not win.
    """
    moving = [norm for norm in norms if norm > 0.0]
    return statistics.median_low(moving) if moving else 0.0


def norm_bound(medians: Sequence[float], *, factor: float) -> float:
    """How long an update of the next round may be: a factor of the running median, `inf` where there is none yet.

    The median over rounds of each round's median: neither a minority of the devices nor a minority of the rounds moves
    it. It is taken of the lengths before clipping, so that it cannot sink by its own doing.

    Args:
        medians: of the newest rounds, from `norm_median`, in any order; zeros say nothing.
        factor: 0 for no such bound.
    """
    known = [median for median in medians if median > 0.0]
    return factor * statistics.median_low(known) if known and factor > 0.0 else math.inf


def _clipped(vector: NDArray[np.float32], norm: float, limit: float) -> NDArray[np.float32]:
    if norm <= limit:
        return vector
    factor = limit / norm
    if factor < _TINY:
        # Two steps: the first is a power of two and exact.
        vector, factor = vector * np.float32(_TINY), factor / _TINY
    return vector * np.float32(factor)


def _check_metrics(
    metrics: Mapping[str, float], expected: Expected, at_least_zero: Collection[str]
) -> Refusal | None:
    if not all(map(math.isfinite, metrics.values())):
        return Refusal.NOT_FINITE
    if not expected.metrics <= metrics.keys():
        return Refusal.MISSING_METRIC
    is_plausible = (
        all(abs(value) <= MAX_METRIC for value in metrics.values())
        and all(metrics[name] >= 0.0 for name in at_least_zero)
        and all(metrics[name] <= 1.0 for name in expected.shares & metrics.keys())
    )
    return None if is_plausible else Refusal.IMPLAUSIBLE


def _check_order(reply: Update | Evaluation, device: str, expected: Expected, kind: str) -> Refusal | None:
    if device != expected.device:
        return Refusal.FOREIGN_ORDER
    if kind != expected.kind:
        return Refusal.WRONG_KIND
    if (reply.run, reply.round_number) != (expected.run, expected.round_number):
        return Refusal.WRONG_ROUND
    if reply.base_sha256 != expected.base_sha256:
        return Refusal.WRONG_BASE
    return None
