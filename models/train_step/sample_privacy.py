"""DP-SGD as a train step: every sample's own gradient is clipped, their sum gets Gaussian noise.

    gradient = (Σ clip(∇ loss_i, C) + z · C · noise) / samples + weight_decay · params + mu · (params − anchor)

Laws of the file: a sample changes the sum by at most C, whatever its loss or weight (a weight says only whether it
counts); nothing in the graph is random: `noise` is an input, standard normal, which the device draws from a secret of
its own (`edge_agent/rounds/sample_noise.py`), so that a step can be compared, and nobody else can take the noise off.
Here is what all private steps share, and the one that takes all samples at once; `sample_loop.py` takes them one by
one.
Source: Abadi et al., "Deep learning with differential privacy" (2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from models.flat import buffer_slots, join_flat, param_slots, split_flat
from models.task import Task
from models.train_step.optimizers import Optimizer
from models.train_step.step import Step, constants_of
from wire.errors import ConfigurationError, UnsupportedLayerError

Tensors = dict[str, Tensor]
Descent = Callable[..., tuple[Tensor, Tensor]]
# Under the square root, so that a gradient of zero has a length to be divided by.
_TINY = 1e-24


@dataclass(frozen=True, slots=True)
class SamplePrivacy:
    """What DP-SGD does to each step.

    Attributes:
        clipping_norm: C, L2 bound of one sample's gradient.
        noise_multiplier: z, standard deviation of the noise on the sum of the gradients, in C.

    Raises:
        ConfigurationError: (operator) a value out of bounds; names it.
    """

    clipping_norm: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        for name, least in (("clipping_norm", 1e-6), ("noise_multiplier", 0.0)):
            value = getattr(self, name)
            if not math.isfinite(value) or not least <= value <= 1e6:
                raise ConfigurationError(
                    f"{name} is {value}", hint=f"use a number from {least:g} to 1e6", name=name
                )


def check_separable(module: nn.Module) -> None:
    """Checks that a sample's gradient is its own.

    Raises:
        UnsupportedLayerError: a layer mixes the samples of a batch, keeps statistics of them, or drops values.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise _refusal(name, layer, "nn.GroupNorm")
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
            raise _refusal(name, layer, "track_running_stats=False")
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise _refusal(name, layer, "p=0")
        if isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0:
            raise _refusal(name, layer, "dropout=0")
        if isinstance(layer, nn.RNNBase) and layer.dropout > 0:
            raise _refusal(name, layer, "dropout=0")


def is_dense(module: nn.Module) -> bool:
    """Whether all parameters are those of linear layers: only there all samples at once are the faster way, and can be
    traced for any number of them (torch pins it where it takes gradients of convolutions sample by sample)."""
    owners = [layer for layer in module.modules() if any(True for _ in layer.parameters(recurse=False))]
    return all(isinstance(layer, nn.Linear) for layer in owners)


def build_private_step(module: nn.Module, task: Task, optimizer: Optimizer, privacy: SamplePrivacy) -> Step:
    """The private step of a dense module in training mode, as a function of `STEP_INPUTS` giving `STEP_OUTPUTS`."""
    slots, statistics = param_slots(module), buffer_slots(module)
    constants = constants_of(module)
    descend = build_descent(optimizer, privacy)

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
        _seed: Tensor,
        _step_index: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        counts = counted(weights)
        fixed = {**split_flat(buffers, statistics), **constants}

        def loss_of(tensors: Tensors, sample: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            one, labels = sample.unsqueeze(0), label.unsqueeze(0)
            outputs = functional_call(module, {**tensors, **fixed}, (one,))
            return task.sample_losses(outputs, one, labels).sum(), outputs.squeeze(0)

        each = vmap(grad_and_value(loss_of, has_aux=True), in_dims=(None, 0, 0))
        # By tensor: vmap over a split vector would pin the batch size.
        gradients, (losses, outputs) = each(split_flat(params, slots), x, y)
        total = join_flat(clipped_sums(gradients, counts, privacy.clipping_norm), slots)
        new_params, new_state = descend(
            params, opt_state, total, counts, lr, momentum, weight_decay, mu, anchor, noise
        )
        metrics = task.sample_metrics(outputs, x, y)
        return new_params, new_state, buffers.clone(), mean_of(losses, counts), mean_of(metrics, counts)

    return step


def build_descent(optimizer: Optimizer, privacy: SamplePrivacy) -> Descent:
    """From a sum of clipped gradients to the next parameters and optimizer state.

    Returns:
        A function of params [P], opt_state [S], the sum [P], counts [B], lr, momentum, weight_decay, mu, anchor [P] and
        noise [P]. Where no sample counts it changes nothing, and adds no noise.
    """

    def descend(
        params: Tensor,
        opt_state: Tensor,
        total: Tensor,
        counts: Tensor,
        lr: Tensor,
        momentum: Tensor,
        weight_decay: Tensor,
        mu: Tensor,
        anchor: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor]:
        samples = counts.sum()
        active = (samples > 0).to(torch.float32)
        if privacy.noise_multiplier > 0:
            total = total + (active * (privacy.noise_multiplier * privacy.clipping_norm)) * noise
        gradient = total / (samples + (1 - active))
        gradient = gradient + (active * weight_decay) * params + (active * mu) * (params - anchor)
        return optimizer.update(params, opt_state, gradient, lr, momentum, active)

    return descend


def counted(weights: Tensor) -> Tensor:
    """1 for each sample that counts, 0 for padding."""
    return (weights > 0).to(torch.float32)


def mean_of(values: Tensor, counts: Tensor) -> Tensor:
    """The mean [] of the values [B] that count; 0 where none does."""
    samples = counts.sum()
    return (values * (counts / (samples + (samples <= 0).to(torch.float32)))).sum()


def clip_factors(squares: Tensor, clipping_norm: float) -> Tensor:
    """What gradients of these squared lengths are multiplied by, so that none is longer than `clipping_norm`."""
    return torch.clamp(clipping_norm / torch.sqrt(squares + _TINY), max=1.0)


def clipped_sums(gradients: Tensors, counts: Tensor, clipping_norm: float) -> Tensors:
    """The sum of the gradients [B, …] of the samples that count (0 or 1, [B]), each at most `clipping_norm` long over
    all tensors."""
    squares = torch.stack([(each * each).flatten(1).sum(1) for each in gradients.values()]).sum(0)
    factors = counts * clip_factors(squares, clipping_norm)
    return {name: factors @ each.flatten(1) for name, each in gradients.items()}


def _refusal(name: str, layer: nn.Module, substitute: str) -> UnsupportedLayerError:
    kind = type(layer).__name__
    what = f"{name} ({kind})" if name else kind
    return UnsupportedLayerError(
        f"{what} has no private train step",
        hint=f"use {substitute}",
        layer=what,
        substitute=substitute,
    )
