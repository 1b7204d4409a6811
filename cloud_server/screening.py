"""Whether a reply may reach an aggregate: pure checks, before any strategy sees a number.

Laws of the file: pure; a refusal is one word of `Refusal` and nothing else; no bytes a device sends end a
round or raise anything but what these functions return. What passes is finite, of the right size, on the
right base, clipped to the round's norm and weighs no more than the device's enrolled cap. Source:
DESIGN.md, law 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from wire.codec import decode
from wire.errors import PeerError
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
    ALREADY_ANSWERED = "already_answered"
    REPLAYED = "replayed"
    ROUND_CLOSED = "round_closed"


LATE = frozenset({Refusal.ROUND_CLOSED})
"""Refusals that say nothing against the device: the reply was sound, and too late."""


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
    return decode_update(update, expected)


def screen_evaluation(evaluation: Evaluation, device: str, expected: Expected) -> int | Refusal:
    """Checks one evaluation; returns its weight, capped."""
    refusal = _check_order(evaluation, device, expected, "evaluate")
    if refusal is not None:
        return refusal
    if not all(map(math.isfinite, evaluation.metrics.values())):
        return Refusal.NOT_FINITE
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
    finite = np.isfinite(vector).all() and np.isfinite(buffers).all()
    if not finite or not all(map(math.isfinite, update.metrics.values())):
        return Refusal.NOT_FINITE
    norm = l2_norm(vector)
    if norm > expected.clipping_norm:
        vector = vector * np.float32(expected.clipping_norm / norm)
    return Screened(vector, buffers, min(update.num_examples, expected.max_examples), norm)


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
