"""A few epochs on the operator's own data after the fold, in bf16 mixed precision: where a GPU earns its keep.

Laws of the file: the result lies within `max_change` (L2) of what came in, and is finite, or it is what came in;
the same arguments on the same device give the same result; buffers stay as the fleet averaged them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.flat import flatten_params, load_flat, params_of
from models.task import Task
from process.logs import get_logger
from wire.errors import ConfigurationError, DataError

_log = get_logger("cloud.refine")
_LEAST = {
    "epochs": 0,
    "batch_size": 1,
    "learning_rate": 0,
    "momentum": 0,
    "weight_decay": 0,
    "max_change": 0,
}
_PASS = 256
"""Samples whose activations are held at once where no batch is asked for."""
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineConfig:
    """How to refine.

    Attributes:
        optimizer: `momentum` is SGD's.
        epochs: passes over the data; 0 switches refinement off.
        max_change: largest L2 norm of the change of the whole parameter vector.
        is_mixed: bf16 autocast (weights, loss and sums stay float32).

    Raises:
        ConfigurationError: (operator) a value out of bounds; names it.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    epochs: int = 0
    batch_size: int = 64
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_change: float = 1.0
    is_mixed: bool = True

    def __post_init__(self) -> None:
        for name, bound in _LEAST.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < bound:
                raise ConfigurationError(
                    f"refine: {name} is {value}", hint=f"use a number from {bound} up", name=name
                )


@dataclass(frozen=True, slots=True, eq=False)
class Refined:
    """What came of it.

    Attributes:
        params: float32 [P].
        change: L2 norm of the change that was kept; 0 where the old parameters were.
        was_cut: whether the change was longer than allowed, and cut back.
        loss_first: mean loss over the first epoch, NaN without an epoch.
        loss_last: mean loss over the last epoch.
    """

    params: Vector
    change: float
    was_cut: bool
    loss_first: float
    loss_last: float


class Refinery:
    """The operator's data, on the device, ready for every round.

    Args:
        make_module: makes the model.
        task: what it is trained for.
        x: float32 [N, …], the operator's training windows.
        y: int64 [N], their labels.
        device: from `aggregate.fold.choose_device`.

    Raises:
        DataError: (operator) no data, or another number of labels than windows.
    """

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        task: Task,
        x: Vector,
        y: NDArray[np.int64],
        *,
        config: RefineConfig,
        device: torch.device | None = None,
    ) -> None:
        if len(x) == 0 or len(x) != len(y):
            raise DataError(
                f"{len(x)} windows and {len(y)} labels to refine on", hint="give each window a label"
            )
        self._device = device or torch.device("cpu")
        self._task = task
        self._config = config
        self._module = make_module().to(self._device)
        self._x = torch.from_numpy(np.array(x, np.float32)).to(self._device)
        self._y = torch.from_numpy(np.array(y, np.int64)).to(self._device)

    def refine(self, params: Vector, buffers: Vector, seed: int) -> Refined:
        """Trains from `params` float32 [P] with the statistics `buffers` float32 [Q].

        Raises:
            ModelError: (us) vectors of another model.
        """
        load_flat(self._module, params, buffers)
        # Statistics stay and dropout is off: a few steps must not redefine what the fleet agreed on.
        self._module.eval()
        losses = self._train(torch.Generator().manual_seed(seed % 2**63))
        first, last = (losses[0], losses[-1]) if losses else (math.nan, math.nan)
        change = flatten_params(self._module).astype(np.float64) - params
        length = float(np.linalg.norm(change))
        if not math.isfinite(length):
            _log.warning("refinement_not_finite", kept="the aggregate as it was")
            return Refined(params, 0.0, False, first, last)
        limit = self._config.max_change
        if length > limit:
            change *= limit / length
        refined = (params + change).astype(np.float32)
        return Refined(refined, min(length, limit), length > limit, first, last)

    def descent(self, params: Vector, buffers: Vector) -> Vector:
        """Where the mean loss of all data falls fastest from `params` float32 [P]: minus its gradient, float32 [P].

        Raises:
            ModelError: (us) vectors of another model.
        """
        load_flat(self._module, params, buffers)
        self._module.eval()
        self._module.zero_grad(set_to_none=True)
        for start in range(0, len(self._x), _PASS):
            x, y = self._x[start : start + _PASS], self._y[start : start + _PASS]
            (self._loss(x, y) * (len(x) / len(self._x))).backward()  # type: ignore[no-untyped-call]
        parts = [
            torch.zeros(tensor.numel()) if tensor.grad is None else -tensor.grad.float().flatten().cpu()
            for tensor in params_of(self._module).values()
        ]
        whole: Vector = torch.cat(parts).numpy()
        return whole

    def _train(self, generator: torch.Generator) -> list[float]:
        """Returns the mean loss of each epoch."""
        config, optimizer = self._config, self._optimizer()
        means = []
        for _ in range(config.epochs):
            total = torch.zeros((), device=self._device)
            for index in self._batches(generator):
                optimizer.zero_grad(set_to_none=True)
                loss = self._loss(self._x[index], self._y[index])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach() * len(index)
            means.append(float(total) / len(self._x))
        return means

    def _optimizer(self) -> torch.optim.Optimizer:
        config, tensors = self._config, list(params_of(self._module).values())
        if config.optimizer == "adam":
            return torch.optim.Adam(tensors, lr=config.learning_rate, weight_decay=config.weight_decay)
        return torch.optim.SGD(
            tensors, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def _batches(self, generator: torch.Generator) -> Iterator[Tensor]:
        order = torch.randperm(len(self._x), generator=generator).to(self._device)
        for start in range(0, len(order), self._config.batch_size):
            yield order[start : start + self._config.batch_size]

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        # cache_enabled=False: the cache holds a bf16 copy of every weight for as long as the context lives.
        with torch.autocast(
            self._device.type, dtype=torch.bfloat16, enabled=self._config.is_mixed, cache_enabled=False
        ):
            outputs = self._module(x)
        return self._task.sample_losses(outputs.float(), x, y).mean()
