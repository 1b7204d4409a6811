"""The exact weighted mean of many vectors, folded one by one: memory does not grow with the cohort.

Laws of the file: torch, one thread (two only spin: the fold is bound by memory); sums in float64 by
default, so that the mean is within 1e-7 of the exact one whatever the order; the device comes from
configuration, and a fall-back to the CPU is said aloud.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from process.logs import get_logger
from wire.errors import ConfigurationError, UpdateError

_log = get_logger("cloud.aggregate")
_PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


def choose_device(name: str) -> torch.device:
    """The torch device that configuration names: `cpu`, `cuda`, `cuda:1` or `auto` (CUDA where there is one).

    A CUDA device that is not there is replaced by the CPU, and a warning says so.

    Raises:
        ConfigurationError: (operator) not the name of a device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(
            f"no device is called {name!r}", hint="use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigurationError(
            f"the device {name!r} is not supported", hint="use auto, cpu, cuda or cuda:N"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        _log.warning("device_not_available", wanted=name, cuda_devices=count, using="cpu")
        return torch.device("cpu")
    return device


class Fold:
    """A running weighted sum of float32 [size] vectors.

    Args:
        size: length of every vector; 0 is legal.
        device: from `choose_device`.
        precision: of the sum: `float64` (8 bytes a value) or `float32` (4 bytes, three times as fast).
    """

    def __init__(self, size: int, *, device: torch.device | None = None, precision: str = "float64") -> None:
        if precision not in _PRECISIONS:
            raise ConfigurationError(f"no precision is called {precision!r}", hint="use float64 or float32")
        self._device = device or torch.device("cpu")
        self._sum = torch.zeros(size, dtype=_PRECISIONS[precision], device=self._device)
        self._weights: list[float] = []

    @property
    def count(self) -> int:
        """How many vectors were added."""
        return len(self._weights)

    @property
    def total_weight(self) -> float:
        """The sum of the weights."""
        return math.fsum(self._weights)

    def add(self, vector: NDArray[np.float32], weight: float) -> None:
        """Adds `weight · vector`. The vector is read before this returns.

        Raises:
            UpdateError: (us) another shape or type, or a weight that is not positive and finite. Nothing is
            added.
        """
        if vector.dtype != np.float32 or vector.shape != tuple(self._sum.shape):
            raise UpdateError(
                f"cannot fold {vector.dtype} {vector.shape}, the fold is float32 {tuple(self._sum.shape)}"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise UpdateError("cannot fold with this weight", weight=weight)
        source = vector if vector.flags.writeable else vector.copy()
        self._sum.add_(torch.from_numpy(source).to(self._device), alpha=float(weight))
        self._weights.append(float(weight))

    def mean(self) -> NDArray[np.float64]:
        """The weighted mean, float64 [size].

        Raises:
            UpdateError: (us) nothing was added.
        """
        if not self._weights:
            raise UpdateError("nothing was folded")
        mean: NDArray[np.float64] = (self._sum.double() / self.total_weight).cpu().numpy()
        return mean
