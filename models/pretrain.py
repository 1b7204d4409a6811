"""The first training of a model, in the cloud, on the operator's own data: what a fleet's first bundle starts from.

One thread, one seed, the same parameters for the same arguments on the same machine. Not used after that: rounds go on
from the head with the exported train step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.task import Task
from wire.errors import DataError


def pretrain(
    module: nn.Module,
    task: Task,
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.int64],
    *,
    epochs: int = 20,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> float:
    """Trains `module` in place with Adam.

    Args:
        x: float32 [N, …]; y: int64 [N] (ignored by a task without labels).

    Returns:
        The mean loss of the last epoch.

    Raises:
        DataError: no samples, or as many labels as samples are missing.
    """
    if len(x) == 0 or len(x) != len(y):
        raise DataError("the first training needs samples with a label each", samples=len(x), labels=len(y))
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(module.parameters(), learning_rate)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    batches = -(-len(x) // batch_size)
    module.train()
    loss = 0.0
    for _ in range(epochs):
        order = np.array_split(rng.permutation(len(x)), batches)
        losses = [_step(module, task, optimizer, inputs[batch], labels[batch]) for batch in order]
        loss = float(np.mean(losses))
    module.eval()
    return loss


def _step(module: nn.Module, task: Task, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = task.sample_losses(module(x), x, y).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())
