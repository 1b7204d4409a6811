"""The aggregate of a round once more, from what devices trained: in float64, with none of the product's folds.

Laws of the file: the set is what is committed as folded; the order is that of the ids; what is owed from round to round
(the part of a step that its code left out) is part of the sum; how a step follows from updates is `steps.py`'s. Source:
docs/architecture.md ("Round").
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_agent.rounds.masked_rounds import Draft
from wire.checkpoint import Checkpoint
from wire.codec import ErrorFeedback, decode
from wire.messages import Update

Vector = NDArray[np.float64]
TOLERANCE = 2e-5


@dataclass(frozen=True, slots=True)
class Folded:
    """A round whose head has moved, as the database has it.

    Attributes:
        collected_in: the round whose updates it is made of.
    """

    round_number: int
    collected_in: int
    base_sha256: str
    head_sha256: str
    residual_key: str
    norm_bound: float
    clipping_norm: float
    seed: int
    updates: tuple[str, ...]
    node_ids: tuple[int, ...]

    @classmethod
    def read(cls, reader: sqlite3.Connection) -> Folded | None:
        """The newest; None for the head that a run begins with."""
        head = reader.execute(
            "SELECT round, sha256, residual_key FROM checkpoints ORDER BY round DESC LIMIT 1"
        ).fetchone()
        if head is None or head[0] == 0:
            return None
        number, sha256, residual = head
        collected = _collected_in(reader, number)
        base, config, seed = reader.execute(
            "SELECT base_sha256, config, seed FROM rounds WHERE number = ?", (collected,)
        ).fetchone()
        plain = json.loads(config)
        # A ServerApp's replies stay as they are until it ends.
        state = "folded" if collected == number else "stored"
        found = reader.execute(
            "SELECT update_id, node_id FROM updates JOIN devices USING (device)"
            " WHERE round = ? AND kind = 'train' AND state = ? ORDER BY update_id",
            (collected, state),
        ).fetchall()
        return cls(
            number,
            collected,
            base,
            sha256,
            residual or "",
            plain.get("norm_bound", float("inf")),
            plain["train"]["clipping_norm"],
            seed,
            tuple(row[0] for row in found),
            tuple(row[1] for row in found),
        )


def _collected_in(reader: sqlite3.Connection, number: int) -> int:
    """The round whose updates are in the head of a round: its own, or where a ServerApp had sent the head out to
    somebody, the last one before in which it had asked for updates."""
    is_app = reader.execute("SELECT count(*) FROM grid_steps").fetchone()[0] > 0
    if not is_app:
        return number
    (found,) = reader.execute(
        "SELECT max(round) FROM orders WHERE kind = 'train' AND round < ?", (number,)
    ).fetchone()
    return int(found)


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """What a device made for a round.

    Attributes:
        update: as it was sent.
        draft: the numbers behind it, before their masks, and the order that asked for them; None without masks.
        staleness: how many heads came after the one that it was trained on.
    """

    update: Update
    node_id: int
    draft: Draft | None = None
    staleness: int = 0


class Step(Protocol):
    """How a step follows from updates; may remember what its strategy does from round to round."""

    def of(self, folded: Folded, base: Checkpoint, replies: Sequence[Made]) -> Vector:
        """By how much the parameters move, float64 [P].

        Raises:
            NotAFoldError: not at all, with these.
        """
        ...


class NotAFoldError(Exception):
    """No step follows from what was folded."""


class FoldCheck:
    """Compares heads with what they should be.

    Args:
        blob: bytes of a blob by its hash (hex).
    """

    def __init__(self, blob: Callable[[str], bytes], step: Step) -> None:
        self._blob = blob
        self._step = step
        self._owed: Vector | None = None

    def compare(self, folded: Folded, replies: Sequence[Made]) -> str:
        """What is wrong with a head; empty when nothing is."""
        checkpoint = Checkpoint.from_bytes(self._blob(folded.base_sha256))
        base = checkpoint.params.astype(np.float64)
        head = Checkpoint.from_bytes(self._blob(folded.head_sha256)).params.astype(np.float64)
        before = np.zeros_like(base) if self._owed is None else self._owed
        left = np.zeros_like(base)
        if folded.residual_key:
            left = owed(self._blob(folded.residual_key), base.size)
        self._owed = left
        try:
            wanted = base + self._step.of(folded, checkpoint, replies) + before
        except NotAFoldError as none:
            return str(none)
        error = float(np.abs(head + left - wanted).max())
        scale = max(1.0, float(np.abs(wanted).max()))
        return "" if error <= TOLERANCE * scale else f"off by {error:.3g}"


def mean(replies: Sequence[Made], bound: float, exponent: float = 0.0) -> Vector:
    """The mean of updates that are cut to the bound, by their examples; float64 [P].

    Args:
        exponent: of the step of an update that is s heads old, (1 + s) to minus this counts.
    """
    total, examples = np.zeros(replies[0].update.params_size, np.float64), 0
    for made in replies:
        each = made.update
        update = decode(each.payload, each.codec, each.params_size).astype(np.float64)
        total += each.num_examples * cut(update, bound) * (1.0 + made.staleness) ** -exponent
        examples += each.num_examples
    return total / examples


def cut(update: Vector, limit: float) -> Vector:
    """An update that is no longer than a bound (L2); float64 [P]."""
    length = float(np.linalg.norm(update))
    return update if length <= limit else update * (limit / length)


def owed(data: bytes, size: int) -> Vector:
    """What the code of a step left out; float64 [P]."""
    return ErrorFeedback.from_bytes(data, size).residual.astype(np.float64)
