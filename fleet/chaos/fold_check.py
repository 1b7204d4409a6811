"""The aggregate of a round once more, from what devices trained: in float64, with none of the product's folds.

Laws of the file: the set is what is committed as folded; the order is that of the ids and does not matter here; what is
owed from round to round (the part of a step that its code left out) is part of the sum, and so is the momentum of a
strategy that has one. Sources: docs/architecture.md ("Round"); Hsu et al., arXiv:1909.06335 (FedAvgM).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wire.checkpoint import Checkpoint
from wire.codec import ErrorFeedback, decode
from wire.messages import Update

Vector = NDArray[np.float64]
TOLERANCE = 2e-5


@dataclass(frozen=True, slots=True)
class Folded:
    """A round whose head has moved, as the database has it."""

    round_number: int
    base_sha256: str
    head_sha256: str
    residual_key: str
    norm_bound: float
    clipping_norm: float
    updates: tuple[str, ...]

    @classmethod
    def read(cls, reader: sqlite3.Connection) -> Folded | None:
        """The newest; None for the head that a run begins with."""
        head = reader.execute(
            "SELECT round, sha256, residual_key FROM checkpoints ORDER BY round DESC LIMIT 1"
        ).fetchone()
        if head is None or head[0] == 0:
            return None
        number, sha256, residual = head
        base, config = reader.execute(
            "SELECT base_sha256, config FROM rounds WHERE number = ?", (number,)
        ).fetchone()
        plain = json.loads(config)
        ids = reader.execute(
            "SELECT update_id FROM updates WHERE round = ? AND kind = 'train' AND state = 'folded'"
            " ORDER BY update_id",
            (number,),
        )
        return cls(
            number,
            base,
            sha256,
            residual or "",
            plain.get("norm_bound", float("inf")),
            plain["train"]["clipping_norm"],
            tuple(row[0] for row in ids),
        )


class FoldCheck:
    """Compares heads with what they should be.

    Args:
        blob: bytes of a blob by its hash (hex).
        momentum: of the server; 0 for plain averaging.
    """

    def __init__(self, blob: Callable[[str], bytes], momentum: float = 0.0) -> None:
        self._blob = blob
        self._momentum = momentum
        self._moving: Vector | None = None
        self._owed: Vector | None = None

    def compare(self, folded: Folded, replies: Sequence[Update]) -> str:
        """What is wrong with a head; empty when nothing is."""
        base = Checkpoint.from_bytes(self._blob(folded.base_sha256)).params.astype(np.float64)
        head = Checkpoint.from_bytes(self._blob(folded.head_sha256)).params.astype(np.float64)
        if not replies:
            return "nothing was folded"
        before = np.zeros_like(base) if self._owed is None else self._owed
        left = np.zeros_like(base)
        if folded.residual_key:
            left = owed(self._blob(folded.residual_key), base.size)
        self._owed = left
        step = mean(replies, min(folded.norm_bound, folded.clipping_norm))
        if self._moving is not None:
            step = step + self._momentum * self._moving
        self._moving = step
        wanted = base + step + before
        error = float(np.abs(head + left - wanted).max())
        scale = max(1.0, float(np.abs(wanted).max()))
        return "" if error <= TOLERANCE * scale else f"off by {error:.3g}"


def mean(replies: Sequence[Update], bound: float) -> Vector:
    """The mean of updates that are cut to the bound, by their examples; float64 [P]."""
    total, examples = np.zeros(replies[0].params_size, np.float64), 0
    for each in replies:
        update = decode(each.payload, each.codec, each.params_size).astype(np.float64)
        total += each.num_examples * _cut(update, bound)
        examples += each.num_examples
    return total / examples


def _cut(update: Vector, limit: float) -> Vector:
    length = float(np.linalg.norm(update))
    return update if length <= limit else update * (limit / length)


def owed(data: bytes, size: int) -> Vector:
    """What the code of a step left out; float64 [P]."""
    return ErrorFeedback.from_bytes(data, size).residual.astype(np.float64)
