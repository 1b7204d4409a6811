"""Puts a checkpoint into a model's two templates: the int8 QDQ file and its float32 twin.

Laws of the file: numpy only, the same code in the cloud and on the device; the result depends on the
arguments alone, bit for bit, whatever the processor: only operations that IEEE 754 rounds exactly (+ − × ÷ √,
round to even, min, max) are used, never a sum or a product over an axis. The int8 bytes are those that
onnxruntime's `quantize_static` would write (QDQ, per channel, MinMax, uint8 activations, symmetric int8
weights); `models/build.py` compares the two at every build.
Source: docs/architecture.md; onnxruntime/quantization/quant_utils.py, `compute_scale_zp`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wire.checkpoint import Checkpoint
from wire.errors import BundleError
from wire.manifest import FLOAT32, TEMPLATE, Manifest
from wire.manifest_layout import Float32Layout, FloatTensor, Int8Layer, Int8Layout, LayerSource

Floats = NDArray[np.float32]

_TINY = np.finfo(np.float32).tiny
_INT32 = np.iinfo(np.int32)
# onnxruntime widens a weight's scale where the bias would not fit into int32; both constants are its own.
_BIAS_MARGIN = np.float32(1.0001)
_BIAS_STEPS = np.float64(_INT32.max) - np.float64(_INT32.min + 1)


def materialize_int8(template: bytes, manifest: Manifest, checkpoint: Checkpoint) -> bytes:
    """The int8 model file.

    Args:
        template: `template.onnx` of the manifest.
        checkpoint: params, buffers and ranges of the same model.

    Raises:
        BundleError: (peer) another template, another model's checkpoint, or params that cannot be folded.
    """
    manifest.file(TEMPLATE).check(template)
    checkpoint.check(manifest)
    return fill_int8(template, manifest.int8, checkpoint)


def materialize_float32(template: bytes, manifest: Manifest, checkpoint: Checkpoint) -> bytes:
    """The float32 model file; arguments and errors are those of `materialize_int8`, with `float32.onnx`."""
    manifest.file(FLOAT32).check(template)
    checkpoint.check(manifest)
    return fill_float32(template, manifest.float32, checkpoint)


def fill_int8(template: bytes, layout: Int8Layout, checkpoint: Checkpoint) -> bytes:
    """The template with a checkpoint in it. The caller has checked that they belong together.

    Raises:
        BundleError: (peer) a BatchNorm that cannot be folded.
    """
    out = bytearray(template)
    # Values at the edge of float32 overflow or divide zero by zero; each such place has its rule below.
    with np.errstate(all="ignore"):
        activations = Activations.of(checkpoint.ranges)
        for patch in layout.ranges:
            _put(out, patch.scale_at, activations.scale[patch.range], "<f4")
            _put(out, patch.zero_point_at, activations.zero_point[patch.range], "u1")
        for layer in layout.layers:
            _write_layer(out, layer, layout.weight_max, activations.scale[layer.input_range], checkpoint)
    for tensor in layout.tensors:
        _write_tensor(out, tensor, checkpoint)
    return bytes(out)


def fill_float32(template: bytes, layout: Float32Layout, checkpoint: Checkpoint) -> bytes:
    """The template with a checkpoint's params and buffers in it; as `fill_int8`."""
    out = bytearray(template)
    with np.errstate(all="ignore"):
        for layer in layout.layers:
            weight, bias = layer_values(layer.source, checkpoint)
            _put(out, layer.weight_at, weight.T if layer.source.transpose else weight, "<f4")
            if layer.bias_at is not None and bias is not None:
                _put(out, layer.bias_at, bias, "<f4")
    for tensor in layout.tensors:
        _write_tensor(out, tensor, checkpoint)
    return bytes(out)


@dataclass(frozen=True, slots=True)
class Activations:
    """How activations are quantized: value = scale · (q − zero_point); float32 [R] and uint8 [R]."""

    scale: Floats
    zero_point: NDArray[np.uint8]

    @classmethod
    def of(cls, ranges: Floats) -> Activations:
        """From float32 [R, 2] (min, max); a range is widened to hold zero, an empty one has the scale 1."""
        low = np.minimum(ranges[:, 0], np.float32(0)).astype(np.float64)
        high = np.maximum(ranges[:, 1], np.float32(0)).astype(np.float64)
        scale = (high - low) / 255.0
        is_empty = scale < _TINY
        safe = np.where(is_empty, 1.0, scale)
        zero_point = np.where(is_empty, 0.0, np.rint(0.0 - low / safe))
        return cls(safe.astype(np.float32), zero_point.astype(np.uint8))


def layer_values(source: LayerSource, checkpoint: Checkpoint) -> tuple[Floats, Floats | None]:
    """Weight (in its own shape, not transposed) and bias [C] of a layer, after its BatchNorm is folded in.

    Raises:
        BundleError: (peer) a variance below zero, or a fold that overflows.
    """
    params, channels = checkpoint.params, source.channels
    weight = params[source.weight : source.weight + source.size].reshape(source.shape)
    bias = None if source.bias is None else params[source.bias : source.bias + channels]
    fold = source.fold
    if fold is None:
        return weight, bias
    gamma, beta = (params[at : at + channels] for at in (fold.gamma, fold.beta))
    mean, variance = (checkpoint.buffers[at : at + channels] for at in (fold.mean, fold.variance))
    factor = gamma / np.sqrt(variance + np.float32(fold.epsilon))
    weight = weight * _along(factor, source)
    bias = ((np.float32(0) if bias is None else bias) - mean) * factor + beta
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise BundleError(f"the BatchNorm of {source.name} cannot be folded", layer=source.name)
    return weight, bias


def _write_layer(
    out: bytearray, layer: Int8Layer, weight_max: int, input_scale: np.float32, checkpoint: Checkpoint
) -> None:
    source = layer.source
    weight, bias = layer_values(source, checkpoint)
    scale = _weight_scale(weight, source, weight_max)
    if bias is not None:
        scale = _widened(scale, bias, input_scale)
    quantized = np.clip(np.rint(weight / _along(scale, source)), -128, 127)
    _put(out, layer.weight_at, quantized.T if source.transpose else quantized, "i1")
    _put(out, layer.scale_at, scale, "<f4")
    if bias is not None and layer.bias_at is not None and layer.bias_scale_at is not None:
        bias_scale = input_scale * scale
        _put(out, layer.bias_at, _quantized_bias(bias, bias_scale), "<i4")
        _put(out, layer.bias_scale_at, bias_scale, "<f4")


def _weight_scale(weight: Floats, source: LayerSource, weight_max: int) -> Floats:
    axes = tuple(axis for axis in range(weight.ndim) if axis != source.channel_axis)
    largest = np.abs(weight).max(axis=axes).astype(np.float64)
    scale = 2.0 * largest / (2.0 * weight_max)
    return np.where(scale < _TINY, 1.0, scale).astype(np.float32)


def _widened(scale: Floats, bias: Floats, input_scale: np.float32) -> Floats:
    smallest = (_BIAS_MARGIN * (np.float32(2) * np.abs(bias))).astype(np.float64) / _BIAS_STEPS
    candidate = np.float64(input_scale) * scale.astype(np.float64)
    is_small = (candidate < smallest) & (candidate > 0.0)
    ratio = smallest / np.where(is_small, candidate, 1.0)
    return np.where(is_small, (scale.astype(np.float64) * ratio).astype(np.float32), scale)


def _quantized_bias(bias: Floats, bias_scale: Floats) -> NDArray[np.float64]:
    steps = np.rint(bias.astype(np.float64) / bias_scale.astype(np.float64))
    # 0 / 0 where a scale underflowed: nothing is to be added there.
    return np.clip(np.where(np.isnan(steps), 0.0, steps), _INT32.min, _INT32.max)


def _write_tensor(out: bytearray, tensor: FloatTensor, checkpoint: Checkpoint) -> None:
    vector = checkpoint.params if tensor.source == "params" else checkpoint.buffers
    value = vector[tensor.offset : tensor.offset + math.prod(tensor.shape)].reshape(tensor.shape)
    _put(out, tensor.at, value.T if tensor.transpose else value, "<f4")


def _along(values: Floats, source: LayerSource) -> Floats:
    shape = [1] * len(source.shape)
    shape[source.channel_axis] = -1
    return values.reshape(shape)


def _put(out: bytearray, at: int, value: NDArray[np.generic] | np.generic, dtype: str) -> None:
    raw = np.ascontiguousarray(value).astype(dtype).tobytes()
    # A slice past the end would grow the file instead of failing; the manifest's check makes that impossible.
    out[at : at + len(raw)] = raw
