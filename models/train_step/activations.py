"""Backward of activations whose own decompositions ONNX cannot express, or whose export is slow.

A mask costs more than the product with it: onnxruntime's `Sign` and `Where` walk value by value. `above` and
`below` are exact steps made of one vectorized `HardSigmoid`. Each function without an underscore replaces the
`aten` operator of its name.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("shoal::above", mutates_args=())
def above(x: Tensor, threshold: float) -> Tensor:
    """1 where `x > threshold`, else 0, as float32."""
    return (x > threshold).to(x.dtype)


@torch.library.custom_op("shoal::below", mutates_args=())
def below(x: Tensor, threshold: float) -> Tensor:
    """1 where `x < threshold`, else 0, as float32."""
    return (x < threshold).to(x.dtype)


@above.register_fake
@below.register_fake
def _(x: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(x)


def threshold_backward(grad: Tensor, output: Tensor, threshold: float) -> Tensor:
    """ReLU's gradient; autograd hands over ReLU's result."""
    mask: Tensor = above(output, threshold)
    return grad * mask


def hardtanh_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Gradient of a clamp (ReLU6 too): passes strictly between `low` and `high`."""
    lower: Tensor = above(x, low)
    upper: Tensor = below(x, high)
    return grad * lower * upper


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x·sigmoid(x)."""
    gate = torch.sigmoid(x)
    return grad * gate * (1 + x * (1 - gate))
