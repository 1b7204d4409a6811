"""BatchNorm in training mode, GroupNorm and LayerNorm: forward and backward in few passes over the values.

Each is `(x - mean) * inverse_std * weight + bias`; only what the mean is taken over differs. A value is
centred once, for the variance and for the backward, and all that is per row (a channel, or a channel of a
sample) is worked out on the small tensors of rows first, so that a scale and a shift are left: one pass of
`affine`. Variances are biased; BatchNorm's running variance is unbiased, as in torch. The public functions
replace the `aten` operators of their names.
Source: Ioffe and Szegedy, arXiv:1502.03167; Wu and He, arXiv:1803.08494; Ba et al., arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from wire.errors import UnsupportedLayerError

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@torch.library.custom_op("shoal::affine", mutates_args=())
def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x * scale + shift` for each row: `x` is `[A, R, B]`, `scale` and `shift` are `[R]`."""
    return x * scale.reshape(1, -1, 1) + shift.reshape(1, -1, 1)


@affine.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.empty_like(x)


def native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output shaped like `x [N, C, …]`, mean and inverse std `[N, groups]`."""
    centred, mean = _centred(x.reshape(1, -1, (c // groups) * hw))
    inverse = torch.rsqrt((centred * centred).mean(2) + eps)
    scale = _by_channel(inverse, weight, groups, c)
    shift = torch.zeros_like(scale) if bias is None else (torch.zeros_like(scale) + bias)
    output = affine(centred.reshape(1, -1, hw), scale.reshape(-1), shift.reshape(-1))
    return output.reshape(x.shape), mean.reshape(-1, groups), inverse.reshape(-1, groups)


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
    """Gradients of input, weight and bias."""
    size = (c // groups) * hw
    centred, _ = _centred(x.reshape(1, -1, size))
    rows = grad.reshape(1, -1, hw)
    sums = rows.sum(2).reshape(-1, c)
    products = (rows * centred.reshape(1, -1, hw)).sum(2).reshape(-1, c)
    grad_x = None
    if output_mask[0]:
        weighted = sums if weight is None else sums * weight
        weighted_products = products if weight is None else products * weight
        mean_grad = weighted.reshape(-1, groups, c // groups).sum(2) / size
        mean_product = weighted_products.reshape(-1, groups, c // groups).sum(2) / size
        scale = _by_channel(inverse, weight, groups, c)
        shift = _by_channel(-inverse * mean_grad, None, groups, c)
        slope = -(inverse * inverse * inverse) * mean_product
        direct = affine(rows, scale.reshape(-1), shift.reshape(-1))
        grad_x = (direct.reshape(1, -1, size) + centred * slope.reshape(1, -1, 1)).reshape(x.shape)
    grad_weight = (products * _by_channel(inverse, None, groups, c)).sum(0) if output_mask[1] else None
    grad_bias = sums.sum(0) if output_mask[2] else None
    return grad_x, grad_weight, grad_bias


def native_layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output shaped like `x`, mean and inverse std with the normalized axes kept as 1."""
    rows = x.reshape(-1, prod(normalized_shape))
    mean = rows.mean(1, keepdim=True)
    centred = rows - mean
    inverse = torch.rsqrt((centred * centred).mean(1, keepdim=True) + eps)
    output = (centred * inverse).reshape(x.shape)
    output = output if weight is None else output * weight
    output = output if bias is None else output + bias
    kept = [*x.shape[: x.dim() - len(normalized_shape)], *[1] * len(normalized_shape)]
    return output, mean.reshape(kept), inverse.reshape(kept)


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
    """Gradients of input, weight and bias."""
    size = prod(normalized_shape)
    normal = (x.reshape(-1, size) - mean.reshape(-1, 1)) * inverse.reshape(-1, 1)
    rows = grad.reshape(-1, size)
    products = rows * normal
    grad_x = None
    if output_mask[0]:
        flat_weight = None if weight is None else weight.reshape(-1)
        weighted = rows if flat_weight is None else rows * flat_weight
        product_mean = (products if flat_weight is None else products * flat_weight).mean(1, keepdim=True)
        inner = weighted - weighted.mean(1, keepdim=True) - normal * product_mean
        grad_x = (inner * inverse.reshape(-1, 1)).reshape(x.shape)
    grad_weight = products.sum(0).reshape(list(normalized_shape)) if output_mask[1] else None
    grad_bias = rows.sum(0).reshape(list(normalized_shape)) if output_mask[2] else None
    return grad_x, grad_weight, grad_bias


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


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = rows.mean(2)
    return rows - mean.unsqueeze(2), mean


def _channel_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.reshape(x.shape[0], x.shape[1], prod(x.shape[2:]))
    mean = rows.mean([0, 2])
    centred = rows - mean.reshape(1, -1, 1)
    return centred, mean, (centred * centred).mean([0, 2])


def _by_channel(per_group: Tensor, weight: Tensor | None, groups: int, channels: int) -> Tensor:
    """A value for each group of a sample as one for each channel, `[N, C]`, times the channel's weight."""
    spread = per_group.reshape(-1, groups, 1)
    factor = torch.ones(groups, channels // groups) if weight is None else weight.reshape(groups, -1)
    return (spread * factor).reshape(-1, channels)


def _count(x: Tensor) -> Tensor:
    """How many values a channel has in this batch, as a tensor: the batch size is a symbol."""
    return torch.scalar_tensor(x.shape[0] * prod(x.shape[2:]), dtype=torch.float32)
