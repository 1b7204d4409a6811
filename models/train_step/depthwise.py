"""Depthwise convolutions over small images or short signals as matrix products.

A kernel that never mixes channels is, for each channel, one matrix from input positions to output positions.
Over few positions that matrix is small, and one batched product beats onnxruntime's grouped `Conv` three
times and its gradients more, although most of the matrix is zero. The matrices are linear in the weights, by
a constant `basis` of zeros and ones that onnxruntime computes once when it loads the graph.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from models.train_step.patches import Window, columns

MAX_PAIRS = 12_000
"""Input positions times output positions (an image of 14 × 14 to 7 × 7 has 9,604) up to which this is faster."""


def fits(x: Tensor, window: Window, groups: int) -> bool:
    """Whether each channel is its own group and the image is small enough."""
    sizes = x.shape[2:]
    if isinstance(x.shape[0], int) and x.shape[0] == 1:
        # One sample is one row for each matrix: reading the matrices takes longer than the convolution.
        return False
    return groups == x.shape[1] and groups > 1 and prod(sizes) * prod(window.output_size(sizes)) <= MAX_PAIRS


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """`[N, C, *sizes]` to `[N, C · m, *out sizes]`."""
    out_sizes = window.output_size(x.shape[2:])
    product = _by_channel(x, x.shape[1]) @ _matrices(x, weight, window)
    result = product.reshape(x.shape[1], x.shape[0], -1, prod(out_sizes)).transpose(0, 1)
    result = result.reshape(x.shape[0], weight.shape[0], *out_sizes)
    return result if bias is None else result + bias.reshape(1, -1, *[1] * len(out_sizes))


def grad_input(grad: Tensor, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Shaped like `x`."""
    product = _by_channel(grad, x.shape[1]) @ _matrices(x, weight, window).transpose(1, 2)
    return product.transpose(0, 1).reshape(x.shape)


def grad_weight(grad: Tensor, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Shaped like `weight`, `[C · m, 1, *kernel]`."""
    channels, inputs, outputs = x.shape[1], prod(x.shape[2:]), prod(grad.shape[2:])
    product = _by_channel(x, channels).transpose(1, 2) @ _by_channel(grad, channels)
    pairs = product.reshape(channels, inputs, -1, outputs).transpose(1, 2).reshape(-1, inputs * outputs)
    return (pairs @ _basis(x, window).t()).reshape(weight.shape)


def _by_channel(values: Tensor, channels: int) -> Tensor:
    """`[N, C · m, *sizes]` to `[C, N, m · positions]`."""
    return values.reshape(values.shape[0], channels, -1).transpose(0, 1)


def _matrices(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """For each channel, from inputs to outputs: `[C, positions, m · out positions]`."""
    channels, inputs = x.shape[1], prod(x.shape[2:])
    pairs = weight.reshape(weight.shape[0], -1) @ _basis(x, window)
    split = pairs.reshape(channels, weight.shape[0] // channels, inputs, -1)
    return split.transpose(1, 2).reshape(channels, inputs, -1)


def _basis(x: Tensor, window: Window) -> Tensor:
    """1 where a kernel position links an input to an output: `[kernel positions, inputs · outputs]`."""
    sizes = x.shape[2:]
    inputs = prod(sizes)
    images = torch.eye(inputs).reshape(inputs, 1, *sizes)
    met = columns(images, window.output_size(sizes), window).flatten(2)
    return met.transpose(0, 1).reshape(prod(window.kernel), -1)
