"""Backward of activations whose own decompositions ONNX cannot express, or whose export is slow.

A mask is made of float operators (`sign` of a clamped value) where that is exact: onnxruntime's `Where` over
a bool tensor costs several times as much. Each function replaces the `aten` operator of its name.
"""

from __future__ import annotations

import torch
from torch import Tensor


def threshold_backward(grad: Tensor, output: Tensor, threshold: float) -> Tensor:
    """ReLU's gradient; autograd hands over ReLU's result, so its sign is 0 or 1."""
    if threshold == 0:
        return grad * torch.sign(torch.relu(output))
    return torch.where(output > threshold, grad, 0.0)


def hardtanh_backward(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Gradient of a clamp (ReLU6 too): passes strictly between `low` and `high`."""
    clamped = torch.clamp(x, low, high)
    return grad * torch.sign((clamped - low) * (high - clamped))


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x·sigmoid(x)."""
    gate = torch.sigmoid(x)
    return grad * gate * (1 + x * (1 - gate))
