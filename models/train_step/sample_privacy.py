"""DP-SGD as a train step: every sample's own gradient is clipped, their sum gets Gaussian noise.

    gradient = (Σ clip(∇ loss_i, C) + z · C · noise) / samples + weight_decay · params + mu · (params − anchor)

Laws of the file: a sample changes the sum by at most C, whatever its loss or weight (a weight says only whether it
counts); the noise is a function of (seed, step, element) like a dropout mask, so that a step can be compared and
replayed. It hides a sample from who sees updates and heads and does not know the seed: the seed of a round comes from
the cloud's order, and the hash behind it is not cryptographic, so this is a bound on what a model remembers of a
sample, not a shield against the aggregator. Source: Abadi et al., "Deep learning with differential privacy" (2016);
Box and Muller (1958) for the noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from models.flat import buffer_slots, join_flat, param_slots, split_flat
from models.task import Task
from models.train_step.dropout import WORD, counter_bits
from models.train_step.optimizers import Optimizer
from models.train_step.step import Step, constants_of
from wire.errors import ConfigurationError, UnsupportedLayerError

Tensors = dict[str, Tensor]
# Draws of the counter hash; a private step has no dropout that could ask for the same.
RADIUS_DRAW, ANGLE_DRAW = 0, 1
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
    """Checks that a sample's gradient is its own, and that it can be traced for any number of samples.

    Raises:
        UnsupportedLayerError: a layer mixes the samples of a batch, keeps statistics of them, drops values, or is a
            convolution (torch pins the batch size where it takes gradients of one sample by sample).
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            raise _refusal(name, layer, "nn.Linear")
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise _refusal(name, layer, "nn.GroupNorm")
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
            raise _refusal(name, layer, "track_running_stats=False")
        if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise _refusal(name, layer, "p=0")
        if isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0:
            raise _refusal(name, layer, "dropout=0")


def build_private_step(module: nn.Module, task: Task, optimizer: Optimizer, privacy: SamplePrivacy) -> Step:
    """The private step of a module in training mode, as a function of `STEP_INPUTS` giving `STEP_OUTPUTS`.

    Raises:
        UnsupportedLayerError: see `check_separable`.
    """
    check_separable(module)
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        counts = (weights > 0).to(torch.float32)
        samples = counts.sum()
        active = (samples > 0).to(torch.float32)
        divisor = samples + (1 - active)
        fixed = {**split_flat(buffers, statistics), **constants}

        def loss_of(tensors: Tensors, sample: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
            one, labels = sample.unsqueeze(0), label.unsqueeze(0)
            outputs = functional_call(module, {**tensors, **fixed}, (one,))
            return task.sample_losses(outputs, one, labels).sum(), outputs.squeeze(0)

        each = vmap(grad_and_value(loss_of, has_aux=True), in_dims=(None, 0, 0))
        # By tensor: vmap over a split vector would pin the batch size.
        gradients, (losses, outputs) = each(split_flat(params, slots), x, y)
        total = join_flat(clipped_sums(gradients, counts, privacy.clipping_norm), slots)
        if privacy.noise_multiplier > 0:
            deviation = privacy.noise_multiplier * privacy.clipping_norm
            total = total + (active * deviation) * gaussian(params, seed, step_index)
        gradient = total / divisor
        gradient = gradient + (active * weight_decay) * params + (active * mu) * (params - anchor)
        new_params, new_state = optimizer.update(params, opt_state, gradient, lr, momentum, active)
        shares = counts / divisor
        metric = (task.sample_metrics(outputs, x, y) * shares).sum()
        return new_params, new_state, buffers.clone(), (losses * shares).sum(), metric

    return step


def clipped_sums(gradients: Tensors, counts: Tensor, clipping_norm: float) -> Tensors:
    """The sum of the gradients [B, …] of the samples that count (0 or 1, [B]), each at most `clipping_norm` long over
    all tensors."""
    squares = torch.stack([(each * each).flatten(1).sum(1) for each in gradients.values()]).sum(0)
    factors = counts * torch.clamp(clipping_norm / torch.sqrt(squares + _TINY), max=1.0)
    return {name: factors @ each.flatten(1) for name, each in gradients.items()}


def gaussian(like: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """Standard normal noise shaped like `like`, float32: the same in the graph and in torch.

    From two 32-bit words each, in float64: no value is beyond 6.8.
    """
    radius = (counter_bits(like, seed, step, RADIUS_DRAW).double() + 0.5) / (WORD + 1)
    angle = counter_bits(like, seed, step, ANGLE_DRAW).double() * (2 * math.pi / (WORD + 1))
    return (torch.sqrt(-2 * torch.log(radius)) * torch.cos(angle)).float()


def _refusal(name: str, layer: nn.Module, substitute: str) -> UnsupportedLayerError:
    kind = type(layer).__name__
    what = f"{name} ({kind})" if name else kind
    return UnsupportedLayerError(
        f"{what} has no private train step",
        hint=f"use {substitute}",
        layer=what,
        substitute=substitute,
    )
