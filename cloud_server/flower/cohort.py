"""A round's replies as updates of one base, read as a stream: what our rules are given.

Laws of the file: replies are never held together; every pass decodes them anew; a reply that cannot be used is left
out, is named in the log, and ends nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from cloud_server.flower.records import common_metrics
from process.logs import get_logger
from wire.norm import l2_norm

_log = get_logger("cloud.robust")
_METRICS = "metrics"
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is known of a usable reply without its arrays: the L2 length of its update, its weight, its metrics."""

    length: float
    weight: int
    metrics: MetricRecord


class Cohort:
    """The usable replies of a round as updates of one base; every pass decodes them anew.

    Args:
        replies: as Flower hands them over; what can be read only once is listed.
        weighted_by_key: of the metric that is a reply's weight.
    """

    def __init__(self, base: ArrayRecord, replies: Iterable[Message], weighted_by_key: str) -> None:
        self.base = base
        self.start = flat(base)
        self._replies = replies if isinstance(replies, Sized) else list(replies)
        self._key = weighted_by_key
        self._usable: list[bool] = []
        self.sketches = [each for each in map(self._sketch, self._replies) if each is not None]

    def __len__(self) -> int:
        return len(self.sketches)

    def updates(self) -> Iterator[Vector]:
        """Float32 [P] of each usable reply: its arrays minus the base's."""
        return (update for _, _, update in self.sent())

    def sent(self) -> Iterator[tuple[int, int, Vector]]:
        """The same, behind the node that sent it and its weight."""
        usable = (reply for reply, is_usable in zip(self._replies, self._usable, strict=True) if is_usable)
        for reply, sketch in zip(usable, self.sketches, strict=True):
            yield reply.metadata.src_node_id, sketch.weight, flat(_arrays_of(reply)) - self.start

    def metrics(self) -> list[RecordDict]:
        """The metrics that all usable replies have, with their weights."""
        names = common_metrics([dict(each.metrics) for each in self.sketches])  # type: ignore[arg-type]
        return [
            RecordDict(
                {_METRICS: MetricRecord({self._key: each.weight, **{n: each.metrics[n] for n in names}})}
            )
            for each in self.sketches
        ]

    def _sketch(self, reply: Message) -> Sketch | None:
        sketch = None if reply.has_error() else self._read(reply)
        self._usable.append(sketch is not None)
        return sketch

    def _read(self, reply: Message) -> Sketch | None:
        """None for a reply that nothing can be made of; says why in the log."""
        arrays, metrics = (
            list(reply.content.array_records.values()),
            list(reply.content.metric_records.values()),
        )
        reason = ""
        if len(arrays) != 1 or len(metrics) != 1 or not fits(arrays[0], self.base):
            reason = "other arrays than were sent"
        elif not _is_weight(metrics[0].get(self._key)):
            reason = f"no positive {self._key}"
        else:
            update = flat(arrays[0]) - self.start
            if np.isfinite(update).all():
                # A weight is a number of examples; what is less than one counts as one.
                weight = max(1, int(metrics[0][self._key]))  # type: ignore[arg-type]
                return Sketch(l2_norm(update), weight, metrics[0])
            reason = "not finite"
        _log.warning("reply_left_out", node=reply.metadata.src_node_id, reason=reason)
        return None


# ---- records as vectors ------------------------------------------------------------------------------------


def flat(record: ArrayRecord) -> Vector:
    """All arrays of a record one after the other, float32 [P], new memory."""
    arrays = [array.numpy().ravel() for array in record.values()]
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is infinite, and refused as such
        joined: Vector = (
            np.concatenate(arrays, dtype=np.float32, casting="unsafe") if arrays else np.empty(0, np.float32)
        )
    return joined


def like(record: ArrayRecord, vector: NDArray[np.floating]) -> ArrayRecord:
    """A vector [P] as arrays of the names, shapes and types of a record; counters are rounded."""
    made, offset = ArrayRecord(), 0
    for name, array in record.items():
        old = array.numpy()
        part = vector[offset : offset + old.size].reshape(old.shape)
        whole = np.rint(part) if old.dtype.kind in "iu" else part
        made[name] = Array(np.asarray(whole.astype(old.dtype)))
        offset += old.size
    return made


def _arrays_of(reply: Message) -> ArrayRecord:
    return next(iter(reply.content.array_records.values()))


def fits(record: ArrayRecord, base: ArrayRecord) -> bool:
    """The same names in the same order, the same shapes, numbers."""
    return list(record) == list(base) and all(
        tuple(record[name].shape) == tuple(base[name].shape) and record[name].numpy().dtype.kind in "fiu"
        for name in base
    )


def _is_weight(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value > 0
