"""One optimizer step as one torch function of flat vectors: what the train step graph is traced from.

`gradient = d loss / d params + weight_decay · params + mu · (params - anchor)`; the last term is FedProx's.
The loss is the weighted mean over the batch, so padding with weight 0 leaves it unchanged; a batch whose
weights are all 0 leaves params and optimizer state as they were. BatchNorm sees every row of a batch, padding
too: pad with real samples.
Source: docs/architecture.md, "Train step graph"; FedProx: Li et al., arXiv:1812.06127.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.flat import buffer_slots, buffers_of, join_flat, param_slots, params_of, split_flat
from models.task import Task
from models.train_step.dropout import CounterDropout
from models.train_step.optimizers import Optimizer

STEP_INPUTS = (
    "params",
    "opt_state",
    "buffers",
    "x",
    "y",
    "weights",
    "lr",
    "momentum",
    "weight_decay",
    "mu",
    "anchor",
    "seed",
    "step",
    "noise",
)
STEP_OUTPUTS = ("params_out", "opt_state_out", "buffers_out", "loss", "metric")
PER_SAMPLE_INPUTS = ("x", "y", "weights")

Step = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def build_step(module: nn.Module, task: Task, optimizer: Optimizer) -> Step:
    """The step of a module in training mode, as a function of `STEP_INPUTS` giving `STEP_OUTPUTS`."""
    slots, statistics = param_slots(module), buffer_slots(module)
    constants = constants_of(module)

    def step(
        params: Tensor,
        opt_state: Tensor,
        buffers: Tensor,
        x: Tensor,
        y: Tensor,
        weights: Tensor,
        lr: Tensor,
        momentum: Tensor,
        weight_decay: Tensor,
        mu: Tensor,
        anchor: Tensor,
        seed: Tensor,
        step_index: Tensor,
        _noise: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        total = weights.sum()
        active = (total > 0).to(torch.float32)
        shares = weights / (total + (1 - active))

        leaf = params.detach().requires_grad_()
        # The forward updates statistics in place: it gets copies, which are read back below.
        running = {name: value.clone() for name, value in split_flat(buffers, statistics).items()}
        fixed = {name: value.clone() for name, value in constants.items()}
        with CounterDropout(seed, step_index):
            outputs = functional_call(module, {**split_flat(leaf, slots), **running, **fixed}, (x,))
        loss = (task.sample_losses(outputs, x, y) * shares).sum()
        gradient = torch.autograd.grad(loss, leaf)[0]
        gradient = gradient + (active * weight_decay) * params + (active * mu) * (params - anchor)
        loss, outputs = loss.detach(), outputs.detach()
        new_params, new_state = optimizer.update(params, opt_state, gradient, lr, momentum, active)
        metric = (task.sample_metrics(outputs, x, y) * shares).sum()
        new_buffers = join_flat(running, statistics) if statistics else buffers.clone()
        return (
            new_params,
            new_state,
            torch.where(active > 0, new_buffers, buffers),
            loss,
            metric,
        )

    return step


def constants_of(module: nn.Module) -> dict[str, Tensor]:
    """What of a module is neither trained nor a running statistic, by name."""
    moving = params_of(module).keys() | buffers_of(module).keys()
    everything = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach() for name, value in everything if name not in moving}
