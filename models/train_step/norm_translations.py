"""GroupNorm and LayerNorm in ONNX: each pass over the values counts, what is per row does not.

The twins of the operators in models/train_step/normalization.py, traced by onnxscript for the exporter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import numpy_helper
from onnxscript import opset18

# onnxscript types its operators by tensor kind, which no value in a traced function carries.
op: Any = opset18

_ONE = numpy_helper.from_array(np.ones(1, np.float32))


def affine_onnx(x: Any, scale: Any, shift: Any) -> Any:
    """`affine`: a BatchNormalization of mean 0 and variance 1, in one pass over `x`."""
    shape = op.Shape(scale)
    zeros = op.ConstantOfShape(shape)
    ones = op.ConstantOfShape(shape, value=_ONE)
    return op.BatchNormalization(x, scale, shift, zeros, ones, epsilon=0.0)


def group_norm_onnx(
    x: Any, weight: Any, bias: Any, channels: int, positions: int, groups: int, eps: float
) -> tuple[Any, Any, Any]:
    """`group_norm`."""
    size = channels // groups * positions
    rows = op.Reshape(x, _ints(1, -1, size))
    mean = op.ReduceMean(rows, _ints(2))
    centred = op.Sub(rows, mean)
    variance = op.ReduceMean(op.Mul(centred, centred), _ints(2))
    inverse = op.Reciprocal(op.Sqrt(op.Add(variance, _float(eps))))
    scale = op.Mul(op.Reshape(inverse, _ints(-1, groups, 1)), op.Reshape(weight, _ints(groups, -1)))
    samples = op.Concat(op.Shape(x, start=0, end=1), _ints(1), axis=0)
    shift = op.Expand(op.Reshape(bias, _ints(1, -1)), samples)
    flat = _ints(-1)
    by_channel = op.Reshape(centred, _ints(1, -1, positions))
    y = affine_onnx(by_channel, op.Reshape(scale, flat), op.Reshape(shift, flat))
    by_group = _ints(-1, groups)
    return op.Reshape(y, op.Shape(x)), op.Reshape(mean, by_group), op.Reshape(inverse, by_group)


def group_norm_backward_onnx(
    grad: Any,
    x: Any,
    mean: Any,
    inverse: Any,
    weight: Any,
    channels: int,
    positions: int,
    groups: int,
) -> tuple[Any, Any, Any]:
    """`group_norm_backward`: sums over rows first, then one scale and shift of `grad` and one slope of `x`."""
    size = channels // groups * positions
    by_channel, by_group = _ints(1, -1, positions), _ints(1, -1, size)
    split = _ints(-1, groups, channels // groups)
    rows = op.Reshape(grad, by_channel)
    centred = op.Sub(op.Reshape(x, by_group), op.Reshape(mean, _ints(1, -1, 1)))
    products = op.Mul(rows, op.Reshape(centred, by_channel))
    sums = op.Reshape(op.ReduceSum(rows, _ints(2)), split)
    product_sums = op.Reshape(op.ReduceSum(products, _ints(2)), split)
    weights = op.Reshape(weight, _ints(groups, -1))
    inverses = op.Reshape(inverse, _ints(-1, groups, 1))
    share = op.Mul(inverses, _float(-1.0 / size))
    shift = op.Mul(op.ReduceSum(op.Mul(sums, weights), _ints(2)), share)
    slope = op.Mul(op.ReduceSum(op.Mul(product_sums, weights), _ints(2)), share)
    slope = op.Mul(slope, op.Mul(inverses, inverses))
    scale = op.Mul(inverses, weights)
    shift = op.Expand(shift, op.Shape(scale))
    flat = _ints(-1)
    direct = affine_onnx(rows, op.Reshape(scale, flat), op.Reshape(shift, flat))
    indirect = op.Mul(centred, op.Reshape(slope, _ints(1, -1, 1)))
    grad_x = op.Reshape(op.Add(op.Reshape(direct, by_group), indirect), op.Shape(x))
    grad_weight = op.ReduceSum(op.Mul(product_sums, inverses), _ints(0), keepdims=0)
    grad_bias = op.ReduceSum(sums, _ints(0), keepdims=0)
    return grad_x, op.Reshape(grad_weight, flat), op.Reshape(grad_bias, flat)


def layer_norm_onnx(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """`layer_norm`."""
    return op.LayerNormalization(x, weight, bias, axis=1, epsilon=eps)


def layer_norm_backward_onnx(grad: Any, x: Any, mean: Any, inverse: Any, weight: Any) -> tuple[Any, Any, Any]:
    """`layer_norm_backward`."""
    normal = op.Mul(op.Sub(x, mean), inverse)
    weighted = op.Mul(grad, weight)
    mean_grad = op.ReduceMean(weighted, _ints(1))
    mean_product = op.ReduceMean(op.Mul(weighted, normal), _ints(1))
    inner = op.Sub(op.Sub(weighted, mean_grad), op.Mul(normal, mean_product))
    grad_weight = op.ReduceSum(op.Mul(grad, normal), _ints(0), keepdims=0)
    grad_bias = op.ReduceSum(grad, _ints(0), keepdims=0)
    return op.Mul(inner, inverse), grad_weight, grad_bias


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _float(value: float) -> Any:
    return op.Constant(value_float=value)
