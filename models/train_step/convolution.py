"""Backward of every convolution in operators that ONNX has.

ONNX knows `Conv` and `ConvTranspose`, but no gradient. One set of formulas serves one, two and three
dimensions, strides, dilation, padding, groups and transposed convolutions: the gradient of the input is the
opposite kind of convolution, the gradient of the weight is a batched matrix product of the output gradient
with shifted slices of the input (im2col without a copy per sample). Depthwise weights use products and sums
instead: a matrix product of one row per group is all overhead.
Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Replacement of `aten.convolution_backward`: gradients of input, weight and bias, if asked for."""
    rank = x.dim() - 2
    stride, padding, dilation = (_per_axis(v, rank) for v in (stride, padding, dilation))
    grad_x = grad_weight = grad_bias = None
    if output_mask[0]:
        if transposed:
            grad_x = _convolve(grad, weight, stride, padding, dilation, groups)
        else:
            grad_x = _grad_input(grad, x, weight, stride, padding, dilation, groups)
    if output_mask[1]:
        # A transposed convolution is a convolution seen from its output: input and output gradient change
        # places.
        source, gradient = (grad, x) if transposed else (x, grad)
        grad_weight = _grad_weight(source, gradient, weight, stride, padding, dilation, groups)
    if output_mask[2]:
        grad_bias = grad.sum([0, *range(2, grad.dim())])
    return grad_x, grad_weight, grad_bias


def _per_axis(values: Sequence[int], rank: int) -> list[int]:
    return list(values) if len(values) == rank else [values[0]] * rank


def _convolve(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    result: Tensor = aten.convolution(
        x, weight, None, stride, padding, dilation, False, [0] * (x.dim() - 2), groups
    )
    return result


def _is_pointwise(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int) -> bool:
    return groups == 1 and all(k == 1 for k in (*kernel, *stride)) and not any(padding)


def _grad_input(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    kernel = weight.shape[2:]
    out_channels = weight.shape[0]
    if _is_pointwise(kernel, stride, padding, groups):
        flat = weight.reshape(out_channels, -1).t()
        return torch.matmul(flat, grad.reshape(grad.shape[0], out_channels, -1)).reshape(x.shape)
    if all(s == 1 for s in stride):
        # A convolution with the kernel turned round; onnxruntime's Conv is faster than its ConvTranspose.
        per_group = weight.reshape(groups, out_channels // groups, *weight.shape[1:]).transpose(1, 2)
        turned = per_group.reshape(x.shape[1], out_channels // groups, *kernel).flip(list(range(2, x.dim())))
        edges = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        if all(edge >= 0 for edge in edges):
            return _convolve(grad, turned, stride, edges, dilation, groups)
    rest = [
        i - ((o - 1) * s - 2 * p + d * (k - 1) + 1)
        for i, o, s, p, d, k in zip(
            x.shape[2:], grad.shape[2:], stride, padding, dilation, kernel, strict=True
        )
    ]
    result: Tensor = aten.convolution(grad, weight, None, stride, padding, dilation, True, rest, groups)
    return result


def _grad_weight(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    batch, channels, out_channels = x.shape[0], x.shape[1], grad.shape[1]
    kernel = weight.shape[2:]
    if _is_pointwise(kernel, stride, padding, groups):
        rows = grad.reshape(batch, out_channels, -1)
        columns = x.reshape(batch, channels, -1).transpose(1, 2)
        return torch.matmul(rows, columns).sum(0).reshape(weight.shape)
    slices = _shifted_slices(x, grad, kernel, stride, padding, dilation)
    if groups == channels:
        spread = grad.reshape(batch, groups, out_channels // groups, *grad.shape[2:])
        axes = [0, *range(3, spread.dim())]
        sums = [(spread * part.unsqueeze(2)).sum(axes) for part in slices]
        return torch.stack(sums, -1).reshape(weight.shape)
    per_group = channels // groups
    columns = torch.cat([part.reshape(batch, groups, per_group, -1) for part in slices], 2)
    rows = grad.reshape(batch, groups, out_channels // groups, -1)
    summed = torch.matmul(rows, columns.transpose(2, 3)).sum(0)
    ordered = summed.reshape(groups, out_channels // groups, len(slices), per_group).transpose(2, 3)
    return ordered.reshape(weight.shape)


def _shifted_slices(
    x: Tensor,
    grad: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[Tensor]:
    """For each kernel position, the inputs that it met: `[N, C, *output size]` each."""
    sizes = grad.shape[2:]
    edges: list[int] = []
    for size, out, k, s, p, d in zip(x.shape[2:], sizes, kernel, stride, padding, dilation, strict=True):
        reach = (out - 1) * s + d * (k - 1) + 1
        edges = [p, max(p, reach - size - p), *edges]
    padded = functional.pad(x, edges) if any(edges) else x
    slices = []
    for position in product(*(range(k) for k in kernel)):
        part = padded
        for axis, (at, out, s, d) in enumerate(zip(position, sizes, stride, dilation, strict=True)):
            start = at * d
            part = aten.slice(part, 2 + axis, start, start + (out - 1) * s + 1, s)
        slices.append(part)
    return slices
