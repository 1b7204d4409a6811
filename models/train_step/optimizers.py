"""The optimizers of the train step, over one flat vector: pure functions of (params, state, gradient).

The arithmetic is that of `torch.optim.SGD` (no dampening, no Nesterov) and `torch.optim.Adam` (no AMSGrad);
the step count of Adam is the last element of its state, so that a state is one float32 vector whatever the
optimizer. Weight decay and the FedProx term are in the gradient already (models/train_step/step.py).
Source: Kingma and Ba, arXiv:1412.6980.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from wire.errors import ConfigurationError

ADAM_BETA1 = 0.9
ADAM_BETA2 = 0.999
ADAM_EPSILON = 1e-8
# torch's exporter takes `x + 1e-8` for `x + 0` and leaves it out; a gradient of exactly 0 (a bias before a
# norm) would then divide 0 by 0. Numerator and denominator are scaled, which costs nothing: it goes into
# scalars.
_ADAM_SCALE = 1e4

Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """How one step moves the parameters.

    Attributes:
        name: "sgd" or "adam".
        update: `(params [P], state [S], gradient [P], lr [], momentum [], active []) -> (params [P], state
            [S])`; `active` is 1, or 0 for a batch of nothing but padding, whose gradient is 0 and whose step
            must change nothing. It works on scalars, because a `Where` over P values costs as much as the
            update.
        state_size: S for a given P.
    """

    name: str
    update: Update
    state_size: Callable[[int], int]


def optimizer_named(name: str) -> Optimizer:
    """The optimizer of that name.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in OPTIMIZERS:
        known = ", ".join(sorted(OPTIMIZERS))
        raise ConfigurationError(f"unknown optimizer {name!r}", hint=f"one of: {known}", optimizer=name)
    return OPTIMIZERS[name]


def _sgd(
    params: Tensor, state: Tensor, gradient: Tensor, lr: Tensor, momentum: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    velocity = _decay(momentum, active) * state + gradient
    return params - (lr * active) * velocity, velocity


def _adam(
    params: Tensor, state: Tensor, gradient: Tensor, lr: Tensor, momentum: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    size = params.shape[0]
    first, second, count = torch.split(state, [size, size, 1])
    count = count + active
    first = _decay(ADAM_BETA1, active) * first + (1 - ADAM_BETA1) * gradient
    second = _decay(ADAM_BETA2, active) * second + (1 - ADAM_BETA2) * (gradient * gradient)
    # In float64: 1 - 0.999**t in float32 is off by 6e-5 of itself in the first steps.
    # At least 1: a first batch of padding must not divide 0 by 0.
    steps = torch.clamp(count, min=1).double()
    correction1 = (1 - torch.exp(steps * math.log(ADAM_BETA1))).float()
    correction2 = (1 - torch.exp(steps * math.log(ADAM_BETA2))).float()
    denominator = torch.sqrt(second) / (torch.sqrt(correction2) / _ADAM_SCALE) + ADAM_EPSILON * _ADAM_SCALE
    moved = params - (lr * active * _ADAM_SCALE / correction1) * (first / denominator)
    return moved, torch.cat([first, second, count])


def _decay(factor: Tensor | float, active: Tensor) -> Tensor:
    """The factor where a step is taken, 1 where it is not."""
    return factor * active + (1 - active)


OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType(
    {
        "sgd": Optimizer("sgd", _sgd, lambda size: size),
        "adam": Optimizer("adam", _adam, lambda size: 2 * size + 1),
    }
)
