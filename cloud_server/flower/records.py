"""Our flat vectors as Flower's records, and back.

Laws of the file: names and shapes come from the manifest's slots; what comes back is float32 whatever type a
strategy computed in (FedAdam and QFedAvg return float64), and exactly the tensors that went in, or an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from numpy.typing import NDArray

from cloud_server.flower.private import ArrayView
from cloud_server.rounds.ports import Scalar, Vector
from wire.errors import RoundError
from wire.manifest import TensorSlot


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
