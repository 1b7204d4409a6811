"""Our flat vectors as Flower's records, and back.

Laws of the file: names and shapes come from the manifest's slots; what comes back is float32 whatever type a
strategy computed in (FedAdam and QFedAvg return float64), and exactly the tensors that went in, or an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from numpy.typing import NDArray

from cloud_server.flower.private import ArrayView
from cloud_server.rounds.ports import Scalar, Vector
from wire.errors import RoundError
from wire.manifest import Manifest, TensorSlot

# A counter of batches is one value; nothing larger that is not the model's is carried along.
_MOST_OTHER_VALUES = 16


def to_record(vector: Vector, slots: Sequence[TensorSlot]) -> ArrayRecord:
    """Float32 [P] as named arrays, without a copy: the record reads (and may write) the vector's memory."""
    record = ArrayRecord()
    for slot in slots:
        part = vector[slot.offset : slot.offset + slot.size]
        record[slot.name] = ArrayView(part.reshape(slot.shape))
    return record


def to_vector(record: ArrayRecord, slots: Sequence[TensorSlot]) -> Vector:
    """Named arrays as a new float32 [P].

    Raises:
        RoundError: (strategy) a tensor is missing, unknown or of another shape.
    """
    if set(record) != {slot.name for slot in slots}:
        raise RoundError("the strategy returned other tensors than the model has")
    vector = np.empty(sum(slot.size for slot in slots), np.float32)
    for slot in slots:
        values = record[slot.name].numpy()
        if values.shape != slot.shape:
            raise RoundError(
                f"the strategy returned {slot.name} with the shape {values.shape}", name=slot.name
            )
        vector[slot.offset : slot.offset + slot.size] = values.ravel()
    return vector


@dataclass(frozen=True, slots=True)
class AppArrays:
    """How an app names the tensors of the model: by the model's names, or by position (a list of arrays).

    Attributes:
        params: the app's key of each parameter slot, in the slots' order.
        buffers: the app's key of each buffer slot; empty where the app leaves the buffers alone.
        others: keys that are no tensor of ours and go back as they came (`num_batches_tracked`).
    """

    params: tuple[str, ...]
    buffers: tuple[str, ...]
    others: tuple[str, ...]

    @classmethod
    def of(cls, record: ArrayRecord, manifest: Manifest) -> AppArrays:
        """Finds the model's tensors in a record.

        Raises:
            RoundError: (app) a tensor is missing, of another shape, or not of this model.
        """
        params, buffers = manifest.params, manifest.buffers
        keys = tuple(record)
        if {slot.name for slot in params} <= set(keys):
            names = {slot.name for slot in (*params, *buffers)}
            found = cls(
                tuple(slot.name for slot in params),
                tuple(slot.name for slot in buffers if slot.name in record),
                tuple(key for key in keys if key not in names),
            )
        elif len(keys) in (len(params), len(params) + len(buffers)):
            found = cls(keys[: len(params)], keys[len(params) :], ())
        else:
            raise RoundError(
                f"the app's arrays are not those of the model {manifest.model}",
                hint="start from ArrayRecord(model.state_dict()) of the model that was imported",
            )
        found._check(record, manifest)
        return found

    def _check(self, record: ArrayRecord, manifest: Manifest) -> None:
        slots = (*manifest.params, *manifest.buffers)
        for key, slot in zip((*self.params, *self.buffers), slots, strict=False):
            if tuple(record[key].shape) != slot.shape:
                raise RoundError(
                    f"the app's array {key!r} has the shape {tuple(record[key].shape)}, {slot.name} has {slot.shape}"
                )
        if self.buffers and len(self.buffers) != len(manifest.buffers):
            raise RoundError("the app sends only some of the model's buffers", hint="send all or none")
        for key in self.others:
            if record[key].numpy().size > _MOST_OTHER_VALUES:
                raise RoundError(f"the app's array {key!r} is not one of the model {manifest.model}")

    def vectors(self, record: ArrayRecord, buffers: Vector) -> tuple[Vector, Vector]:
        """The record as float32 [P] and [Q]; the given buffers where the app sends none."""
        params = _joined([record[key].numpy() for key in self.params])
        if not self.buffers:
            return params, buffers
        return params, _joined([record[key].numpy() for key in self.buffers])

    def record(self, params: Vector, buffers: Vector, sent: ArrayRecord) -> ArrayRecord:
        """Vectors as the app names them, in the order in which it sent them."""
        parts = {**_views(self.params, params, sent), **_views(self.buffers, buffers, sent)}
        record = ArrayRecord()
        for key in sent:
            record[key] = parts.get(key, sent[key])
        return record


def _views(keys: Sequence[str], vector: Vector, shapes: ArrayRecord) -> dict[str, ArrayView]:
    """The parts of a vector one after the other, under these keys and with the shapes that the app sent."""
    views, offset = {}, 0
    for key in keys:
        shape = tuple(shapes[key].shape)
        size = math.prod(shape)
        views[key] = ArrayView(vector[offset : offset + size].reshape(shape))
        offset += size
    return views


def _joined(arrays: Sequence[NDArray[np.generic]]) -> Vector:
    return np.concatenate([array.ravel() for array in arrays]).astype(np.float32)


def to_metrics(record: MetricRecord | None) -> dict[str, float]:
    """The scalar metrics of a record; lists and what is not finite are left out."""
    if record is None:
        return {}
    plain = {key: float(value) for key, value in record.items() if isinstance(value, int | float)}
    return {key: value for key, value in plain.items() if math.isfinite(value)}


def to_config(record: ConfigRecord) -> dict[str, Scalar]:
    """The scalar entries of a strategy's configuration."""
    return {
        key: value for key, value in record.items() if isinstance(value, bool | int | float | str | bytes)
    }


def common_metrics(metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """The names that all replies have: Flower ends the run when one reply has a metric that another lacks."""
    if not metrics:
        return []
    common = set(metrics[0]).intersection(*metrics[1:])
    return sorted(common - {"num-examples"})


def as_named(record: ArrayRecord) -> dict[str, NDArray[np.generic]]:
    """The arrays of a record by name."""
    return {name: array.numpy() for name, array in record.items()}
