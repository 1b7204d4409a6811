"""Our own operators in ONNX: the translation table of the exporter.

Each function is the twin of a torch operator of the same name, traced by onnxscript; the two must agree, and
models/train_step/verify.py compares them in every exported graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset18

from models.train_step import norm_translations
from models.train_step.dropout import MULTIPLIERS, SECOND_KEY, SHIFTS, WORD

# onnxscript types its operators by tensor kind, which no value in a traced function carries.
op: Any = opset18

# A power of two keeps threshold * STEEP exact, so the sign of x - threshold decides and nothing else; values
# closer to the threshold than 1 / STEEP are not met in float32 nets.
STEEP = 2.0**100


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """ONNX translations of our own operators, for the exporter."""
    return {
        torch.ops.shoal.above.default: above_onnx,
        torch.ops.shoal.affine.default: norm_translations.affine_onnx,
        torch.ops.shoal.group_norm.default: norm_translations.group_norm_onnx,
        torch.ops.shoal.group_norm_backward.default: norm_translations.group_norm_backward_onnx,
        torch.ops.shoal.layer_norm.default: norm_translations.layer_norm_onnx,
        torch.ops.shoal.layer_norm_backward.default: norm_translations.layer_norm_backward_onnx,
        torch.ops.shoal.below.default: below_onnx,
        torch.ops.shoal.counter_bits.default: counter_bits_onnx,
        torch.ops.shoal.max_pool.default: max_pool_onnx,
        torch.ops.shoal.max_unpool.default: max_unpool_onnx,
    }


def above_onnx(x: Any, threshold: float) -> Any:
    """The ONNX twin of `above`: a HardSigmoid so steep that it is a step."""
    return op.HardSigmoid(x, alpha=STEEP, beta=-threshold * STEEP)


def below_onnx(x: Any, threshold: float) -> Any:
    """The ONNX twin of `below`."""
    return op.HardSigmoid(x, alpha=-STEEP, beta=threshold * STEEP)


def counter_bits_onnx(like: Any, seed: Any, step: Any, layer: int) -> Any:
    """The ONNX twin of `counter_bits`."""
    low = op.BitwiseAnd(seed, _int64(WORD))
    # What is left of the seed is a multiple of 2**32, so a division is the arithmetic shift that ONNX lacks.
    high = op.BitwiseAnd(op.Div(op.Sub(seed, low), _int64(WORD + 1)), _int64(WORD))
    key = _mix_onnx(op.BitwiseXor(_mix_onnx(low), high))
    key = _mix_onnx(op.BitwiseXor(key, op.BitwiseAnd(step, _int64(WORD))))
    key = _mix_onnx(op.BitwiseXor(key, _int64(layer)))
    counter = op.Range(_int64(0), op.Size(like), _int64(1))
    second = _mix_onnx(op.BitwiseXor(key, _int64(SECOND_KEY)))
    bits = _mix_onnx(op.BitwiseXor(_mix_onnx(op.BitwiseXor(counter, key)), second))
    return op.Reshape(bits, op.Shape(like))


def _int64(value: int) -> Any:
    return op.Constant(value_int=value)


def _shift_right(word: Any, count: int) -> Any:
    amount = op.Cast(_int64(count), to=TensorProto.UINT64)
    shifted = op.BitShift(op.Cast(word, to=TensorProto.UINT64), amount, direction="RIGHT")
    return op.Cast(shifted, to=TensorProto.INT64)


def _mix_onnx(word: Any) -> Any:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        word = op.BitwiseXor(word, _shift_right(word, shift))
        if multiplier != 1:
            word = op.BitwiseAnd(op.Mul(word, _int64(multiplier)), _int64(WORD))
    return word


def max_pool_onnx(
    x: Any,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> Any:
    """The ONNX twin of `max_pool`."""
    return op.MaxPool(
        x,
        kernel_shape=list(kernel),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        ceil_mode=int(ceil),
    )


def max_unpool_onnx(
    grad: Any, indices: Any, x: Any, kernel: Sequence[int], stride: Sequence[int], overlapping: bool
) -> Any:
    """The ONNX twin of `max_unpool`."""
    shape = op.Shape(x)
    if not overlapping:
        return op.MaxUnpool(grad, indices, shape, kernel_shape=list(kernel), strides=list(stride))
    flat = op.Constant(value_ints=[-1])
    zeros = op.Expand(op.Constant(value_float=0.0), op.Reshape(op.Size(x), op.Constant(value_ints=[1])))
    added = op.ScatterElements(zeros, op.Reshape(indices, flat), op.Reshape(grad, flat), reduction="add")
    return op.Reshape(added, shape)
