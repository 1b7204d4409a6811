"""BatchNorm in training mode, GroupNorm and LayerNorm: forward and backward in few passes over the values.

Each is `(x - mean) * inverse_std * weight + bias`; only what the mean is taken over differs. A value is centred
once, for the variance and for the backward, and all that is per row (a channel, or a channel of a sample) is
worked out on the small tensors of rows first, so that a scale and a shift are left: one pass of `affine`.
GroupNorm and LayerNorm are operators of our own, whose passes are written in ONNX
(models/train_step/norm_translations.py); BatchNorm is written here in torch's. Variances are biased; BatchNorm's
running variance is unbiased, as in torch.
Source: Ioffe and Szegedy, arXiv:1502.03167; Wu and He, arXiv:1803.08494; Ba et al., arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from wire.errors import UnsupportedLayerError

aten = torch.ops.aten

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
EVERYTHING = [True, True, True]


@torch.library.custom_op("shoal::affine", mutates_args=())
def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x * scale + shift` for each row: `x` is `[A, R, B]`, `scale` and `shift` are `[R]`."""
    return x * scale.reshape(1, -1, 1) + shift.reshape(1, -1, 1)


@affine.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("shoal::group_norm", mutates_args=())
def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, channels: int, positions: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm of `x [N, channels, …]`: the output, and mean and inverse std `[N, groups]`."""
    y, mean, inverse = aten.native_group_norm(x, weight, bias, x.shape[0], channels, positions, groups, eps)
    return y, mean, inverse


@group_norm.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, channels: int, positions: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], groups), x.new_empty(x.shape[0], groups)


@torch.library.custom_op("shoal::group_norm_backward", mutates_args=())
def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    channels: int,
    positions: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias."""
    gradients = aten.native_group_norm_backward(
        grad, x, mean, inverse, weight, x.shape[0], channels, positions, groups, EVERYTHING
    )
    return gradients[0], gradients[1], gradients[2]


@group_norm_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    channels: int,
    positions: int,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@torch.library.custom_op("shoal::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of rows `[R, D]`: the output, and mean and inverse std `[R, 1]`."""
    y, mean, inverse = aten.native_layer_norm(x, [x.shape[1]], weight, bias, eps)
    return y, mean, inverse


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], 1), x.new_empty(x.shape[0], 1)


@torch.library.custom_op("shoal::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, for rows `[R, D]`."""
    gradients = aten.native_layer_norm_backward(
        grad, x, [x.shape[1]], mean, inverse, weight, torch.zeros_like(weight), EVERYTHING
    )
    return gradients[0], gradients[1], gradients[2]


@layer_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Replacement of `aten.native_group_norm`."""
    y, mean, inverse = group_norm(x, _or(weight, 1.0, c), _or(bias, 0.0, c), c, hw, groups, eps)
    return y, mean, inverse


def native_group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    hw: int,
    groups: int,
    output_mask: Sequence[bool],
) -> Gradients:
    """Replacement of `aten.native_group_norm_backward`."""
    gradients = group_norm_backward(grad, x, mean, inverse, _or(weight, 1.0, c), c, hw, groups)
    return _wanted(gradients, output_mask)


def native_layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Replacement of `aten.native_layer_norm`."""
    size = prod(normalized_shape)
    y, mean, inverse = layer_norm(x.reshape(-1, size), _or(weight, 1.0, size), _or(bias, 0.0, size), eps)
    kept = [*x.shape[: x.dim() - len(normalized_shape)], *[1] * len(normalized_shape)]
    return y.reshape(x.shape), mean.reshape(kept), inverse.reshape(kept)


def native_layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> Gradients:
    """Replacement of `aten.native_layer_norm_backward`."""
    shape, size = list(normalized_shape), prod(normalized_shape)
    grad_x, grad_weight, grad_bias = layer_norm_backward(
        grad.reshape(-1, size),
        x.reshape(-1, size),
        mean.reshape(-1, 1),
        inverse.reshape(-1, 1),
        _or(weight, 1.0, size),
    )
    gradients = (grad_x.reshape(x.shape), grad_weight.reshape(shape), grad_bias.reshape(shape))
    return _wanted(gradients, output_mask)


def batch_norm_functional(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Replacement of `aten._native_batch_norm_legit_functional`: `batch_norm` and the new running statistics."""
    output, mean, inverse = batch_norm(x, weight, bias, training, momentum, eps)
    count = _count(x)
    unbiased = _channel_statistics(x)[2] * (count / (count - 1))
    new_mean = (1 - momentum) * running_mean + momentum * mean
    new_var = (1 - momentum) * running_var + momentum * unbiased
    return output, mean, inverse, new_mean, new_var


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Replacement of `aten._native_batch_norm_legit.no_stats`: output, mean and inverse std of the batch.

    Raises:
        UnsupportedLayerError: a BatchNorm that is held in evaluation mode.
    """
    if not training:
        hint = "let it train, or use nn.GroupNorm, which has no running statistics"
        raise UnsupportedLayerError(
            "BatchNorm in evaluation mode has no training graph",
            hint=hint,
            layer="BatchNorm",
            substitute=hint,
        )
    centred, mean, variance = _channel_statistics(x)
    inverse = torch.rsqrt(variance + eps)
    scale = inverse if weight is None else inverse * weight
    shift = torch.zeros_like(mean) if bias is None else bias
    return affine(centred, scale, shift).reshape(x.shape), mean, inverse


def native_batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    train: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> Gradients:
    """Gradients of input, weight and bias."""
    rows = x.reshape(x.shape[0], x.shape[1], prod(x.shape[2:]))
    centred = rows - mean.reshape(1, -1, 1)
    gradients = grad.reshape(rows.shape)
    sums = gradients.sum([0, 2])
    products = (gradients * centred).sum([0, 2])
    grad_x = None
    if output_mask[0]:
        count = _count(x)
        scale = inverse if weight is None else inverse * weight
        slope = -scale * inverse * inverse * (products / count)
        direct = affine(gradients, scale, -scale * (sums / count))
        grad_x = (direct + affine(centred, slope, torch.zeros_like(slope))).reshape(x.shape)
    grad_weight = products * inverse if output_mask[1] else None
    return grad_x, grad_weight, sums if output_mask[2] else None


def _or(values: Tensor | None, otherwise: float, size: int) -> Tensor:
    """The flat values, or a constant where a norm has none."""
    return torch.full((size,), otherwise) if values is None else values.reshape(-1)


def _wanted(gradients: tuple[Tensor, Tensor, Tensor], output_mask: Sequence[bool]) -> Gradients:
    first, second, third = (
        gradient if is_wanted else None for gradient, is_wanted in zip(gradients, output_mask, strict=True)
    )
    return first, second, third


def _channel_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(x.shape[0], x.shape[1], prod(x.shape[2:]))
    mean = rows.mean([0, 2])
    centred = rows - mean.reshape(1, -1, 1)
    return centred, mean, (centred * centred).mean([0, 2])


def _count(x: Tensor) -> Tensor:
    """How many values a channel has in this batch, as a tensor: the batch size is a symbol."""
    return torch.scalar_tensor(x.shape[0] * prod(x.shape[2:]), dtype=torch.float32)
