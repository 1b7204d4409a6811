"""A data set as a fleet sees it: the operator's share, one for each device, and a hash that names both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Split:
    """Samples float32 [N, *input_shape] and labels int64 [N] in three parts that share nothing.

    `train` is for the device's training, `val` for federated evaluation (the gate, and every choice of a
    setting), `test` for the report alone.
    """

    train_x: Floats
    train_y: Labels
    val_x: Floats
    val_y: Labels
    test_x: Floats
    test_y: Labels

    def digest(self) -> bytes:
        """SHA-256 over all values, 32 bytes."""
        state = hashlib.sha256()
        for x, y in ((self.train_x, self.train_y), (self.val_x, self.val_y), (self.test_x, self.test_y)):
            state.update(repr((x.shape, y.shape)).encode())
            state.update(np.ascontiguousarray(x, "<f4").tobytes())
            state.update(np.ascontiguousarray(y, "<i8").tobytes())
        return state.digest()


@dataclass(frozen=True, eq=False)
class Federation:
    """A data set, divided.

    Attributes:
        name: of the data set, as commands have it.
        labels: the name of each class.
        input_shape: of one sample.
        operator: the operator's own data; their devices do not take part.
        devices: by device id.
        unseen: for an anomaly score: samples of what no part of the data holds, by what they are.
    """

    name: str
    labels: tuple[str, ...]
    input_shape: tuple[int, ...]
    operator: Split
    devices: Mapping[str, Split]
    unseen: Mapping[str, Floats] = field(default_factory=dict)

    def split_hash(self) -> str:
        """SHA-256 (hex) over every sample of every part: equal hashes mean the same experiment."""
        state = hashlib.sha256(self.operator.digest())
        for device_id, split in sorted(self.devices.items()):
            state.update(device_id.encode() + b"\0" + split.digest())
        for name, x in sorted(self.unseen.items()):
            state.update(f"{name}\0{x.shape}".encode() + np.ascontiguousarray(x, "<f4").tobytes())
        return state.hexdigest()
