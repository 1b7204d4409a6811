"""Convolutions and their gradients in operators that ONNX has, and that onnxruntime runs fast.

ONNX knows `Conv` and `ConvTranspose`, but no gradient; and a `Conv` whose weights change is slow for short
signals and for depthwise kernels. `convolution_1d.py` and `depthwise.py` have those two; here is the general
case for one, two and three dimensions, strides, dilation, padding, groups and transposed convolutions: the
gradient of the input is the opposite kind of convolution, the gradient of the weight a batched matrix product
of the output gradient with the inputs that each kernel position met.
Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.train_step import convolution_1d, depthwise
from models.train_step.patches import Window, columns

aten = torch.ops.aten

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Replacement of `aten.convolution` where a matrix product is faster; else NotImplemented: left to ONNX."""
    window = Window.of(x, weight, stride, padding, dilation)
    if not transposed and convolution_1d.fits(x, window, groups):
        return convolution_1d.forward(x, weight, bias, window)
    if not transposed and depthwise.fits(x, window, groups):
        return depthwise.forward(x, weight, bias, window)
    left: Any = NotImplemented
    return left  # type: ignore[no-any-return]


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
) -> Gradients:
    """Replacement of `aten.convolution_backward`: gradients of input, weight and bias, if asked for."""
    window = Window.of(x, weight, stride, padding, dilation)
    grad_x = grad_weight = None
    if output_mask[0]:
        grad_x = _grad_input(grad, x, weight, window, transposed, groups)
    if output_mask[1]:
        # A transposed convolution is a convolution seen from its output: input and output gradient change
        # places.
        source, gradient = (grad, x) if transposed else (x, grad)
        grad_weight = _grad_weight(gradient, source, weight, window, groups)
    grad_bias = grad.sum([0, *range(2, grad.dim())]) if output_mask[2] else None
    return grad_x, grad_weight, grad_bias


def _grad_input(
    grad: Tensor, x: Tensor, weight: Tensor, window: Window, transposed: bool, groups: int
) -> Tensor:
    shape = (window.stride, window.padding, window.dilation)
    none = [0] * len(window.kernel)
    if transposed:
        straight: Tensor = aten.convolution(grad, weight, None, *shape, False, none, groups)
        return straight
    if convolution_1d.fits(x, window, groups):
        return convolution_1d.grad_input(grad, x, weight, window)
    if depthwise.fits(x, window, groups):
        return depthwise.grad_input(grad, x, weight, window)
    if window.is_pointwise and groups == 1:
        flat = weight.reshape(weight.shape[0], -1).t()
        return torch.matmul(flat, grad.flatten(2)).reshape(x.shape)
    rest = window.left_over(x.shape[2:], grad.shape[2:])
    turned: Tensor = aten.convolution(grad, weight, None, *shape, True, rest, groups)
    return turned


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor, window: Window, groups: int) -> Tensor:
    if convolution_1d.fits(x, window, groups):
        return convolution_1d.grad_weight(grad, x, weight, window)
    if depthwise.fits(x, window, groups):
        return depthwise.grad_weight(grad, x, weight, window)
    channels, out_channels, kernel = x.shape[1], grad.shape[1], weight.shape[2:]
    met = x.flatten(2) if window.is_pointwise else columns(x, grad.shape[2:], window).flatten(2)
    if groups == 1:
        # Three axes and no more, so that onnxruntime fuses the transposition into the product.
        summed = torch.matmul(grad.flatten(2), met.transpose(1, 2)).sum(0)
        ordered = summed.reshape(out_channels, -1, channels).transpose(1, 2)
        return ordered.reshape(weight.shape)
    per_group, out_per_group = channels // groups, out_channels // groups
    if per_group == 1:
        # One row per group is too little for a matrix product.
        spread = grad.reshape(grad.shape[0], 1, groups, out_per_group, -1)
        products = spread * met.reshape(met.shape[0], -1, groups, 1, met.shape[2])
        return products.sum(4).sum(0).flatten(1).t().reshape(weight.shape)
    rows = grad.reshape(grad.shape[0], groups, out_per_group, -1)
    by_group = met.reshape(met.shape[0], -1, groups, per_group, met.shape[2]).transpose(1, 2).flatten(2, 3)
    summed = torch.matmul(rows, by_group.transpose(2, 3)).sum(0)
    ordered = summed.reshape(out_channels, -1, per_group).transpose(1, 2)
    return ordered.reshape(out_channels, per_group, *kernel)
