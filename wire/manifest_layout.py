"""Where parameters lie in the two template files: the int8 QDQ graph and its float32 twin.

Laws of the file: types and bounds only. Every patch lies inside its file and no two overlap; every source
lies inside its vector; else `BundleError`. `wire/materialize.py` relies on it. Words: an *offset* counts
elements in the flat `params` or `buffers` vector; an *`_at`* counts bytes in a file. All is little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from msgspec import Meta, Struct

from wire.errors import BundleError

_MAX_ELEMENTS = 2**26
_MAX_PATCHES = 4096

Offset = Annotated[int, Meta(ge=0, le=_MAX_ELEMENTS)]
At = Annotated[int, Meta(ge=0, le=512 * 1024 * 1024)]
Shape = Annotated[tuple[Annotated[int, Meta(ge=1, le=_MAX_ELEMENTS)], ...], Meta(max_length=8)]
Span = tuple[int, int]


class Fold(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A BatchNorm that is folded into the layer before it; C values at each offset.

    `gamma` and `beta` are in `params`, `mean` and `variance` in `buffers`.
    """

    gamma: Offset
    beta: Offset
    mean: Offset
    variance: Offset
    epsilon: Annotated[float, Meta(gt=0.0, le=1.0)]


class LayerSource(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Weight and bias of one Conv, ConvTranspose, Gemm or MatMul, as they come out of the vectors.

    Attributes:
        weight: offset in `params`; `shape` is its shape there.
        channel_axis: axis of `shape` that counts output channels (C of them), one scale each.
        transpose: the graph holds the weight with its two axes swapped.
        bias: offset of C values in `params`, or None (a folded layer still has the bias that the fold makes).
    """

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    weight: Offset
    shape: Annotated[Shape, Meta(min_length=2)]
    channel_axis: Literal[0, 1] = 0
    transpose: bool = False
    bias: Offset | None = None
    fold: Fold | None = None

    @property
    def channels(self) -> int:
        """Number of output channels, C."""
        return self.shape[self.channel_axis]

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def has_bias(self) -> bool:
        """Whether the layer in the graph has a bias."""
        return self.bias is not None or self.fold is not None

    def check(self, params_size: int, buffers_size: int) -> None:
        """Raises `BundleError` where a source lies outside of its vector."""
        _require(not self.transpose or len(self.shape) == 2, f"{self.name} is transposed but has no two axes")
        ends = [self.weight + self.size]
        if self.bias is not None:
            ends.append(self.bias + self.channels)
        if self.fold is not None:
            ends += [self.fold.gamma + self.channels, self.fold.beta + self.channels]
            buffers_end = max(self.fold.mean, self.fold.variance) + self.channels
            _require(buffers_end <= buffers_size, f"{self.name} reads behind the end of buffers")
        _require(max(ends) <= params_size, f"{self.name} reads behind the end of params")


class Int8Layer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer in the int8 template: int8 weight, float32 [C] scale, int32 [C] bias, float32 [C] bias scale.

    `input_range` is the row of `ranges` for the layer's input: bias scale = weight scale × its scale.
    """

    source: LayerSource
    weight_at: At
    scale_at: At
    bias_at: At | None = None
    bias_scale_at: At | None = None
    input_range: Annotated[int, Meta(ge=0, le=16_384)]

    def spans(self) -> Iterator[Span]:
        """(at, size in bytes) of every place that the layer writes to."""
        yield self.weight_at, self.source.size
        yield self.scale_at, 4 * self.source.channels
        if self.bias_at is not None and self.bias_scale_at is not None:
            yield self.bias_at, 4 * self.source.channels
            yield self.bias_scale_at, 4 * self.source.channels


class Int8Range(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Row number `range` of `ranges` in the int8 template: a float32 scale and a uint8 zero point.

    Operators that only move values (pools, reshapes) share the row of their input.
    """

    range: Annotated[int, Meta(ge=0, le=16_384)]
    tensor: Annotated[str, Meta(min_length=1, max_length=256)]
    scale_at: At
    zero_point_at: At

    def spans(self) -> Iterator[Span]:
        """(at, size in bytes) of the two places."""
        yield self.scale_at, 4
        yield self.zero_point_at, 1


class FloatTensor(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A float32 tensor that goes into a template as it is, or with its two axes swapped.

    `offset` and `shape` are those in the `source` vector.
    """

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    source: Literal["params", "buffers"] = "params"
    offset: Offset
    shape: Shape
    transpose: bool = False
    at: At

    def spans(self) -> Iterator[Span]:
        """(at, size in bytes) of the place."""
        yield self.at, 4 * math.prod(self.shape)

    def check(self, params_size: int, buffers_size: int) -> None:
        """Raises `BundleError` where the source lies outside of its vector."""
        _require(not self.transpose or len(self.shape) == 2, f"{self.name} is transposed but has no two axes")
        limit = params_size if self.source == "params" else buffers_size
        end = self.offset + math.prod(self.shape)
        _require(end <= limit, f"{self.name} reads behind the end of {self.source}")


class Float32Layer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A layer in the float32 template, after the fold: float32 weight and float32 [C] bias."""

    source: LayerSource
    weight_at: At
    bias_at: At | None = None

    def spans(self) -> Iterator[Span]:
        """(at, size in bytes) of every place that the layer writes to."""
        yield self.weight_at, 4 * self.source.size
        if self.bias_at is not None:
            yield self.bias_at, 4 * self.source.channels


_Patch = Int8Layer | Int8Range | FloatTensor | Float32Layer


class Int8Layout(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Patches of `template.onnx`. Weights are in [-weight_max, weight_max]."""

    weight_max: Annotated[int, Meta(ge=1, le=127)]
    layers: Annotated[tuple[Int8Layer, ...], Meta(max_length=_MAX_PATCHES)]
    ranges: Annotated[tuple[Int8Range, ...], Meta(max_length=16_384)]
    tensors: Annotated[tuple[FloatTensor, ...], Meta(max_length=_MAX_PATCHES)] = ()

    def check(self, params_size: int, buffers_size: int, ranges_count: int, file_bytes: int) -> None:
        """Raises `BundleError` where a source or a place is out of bounds, or two places overlap."""
        rows = sorted(patch.range for patch in self.ranges)
        _require(rows == list(range(ranges_count)), "the int8 layout does not use each range once")
        for layer in self.layers:
            layer.source.check(params_size, buffers_size)
            _require(layer.input_range < ranges_count, f"{layer.source.name} has an input without a range")
            places = (layer.bias_at is not None, layer.bias_scale_at is not None)
            _require(places == (layer.source.has_bias,) * 2, f"{layer.source.name} has half a bias")
        for tensor in self.tensors:
            tensor.check(params_size, buffers_size)
        patches: tuple[_Patch, ...] = (*self.layers, *self.ranges, *self.tensors)
        spans = [span for patch in patches for span in patch.spans()]
        _check_spans(spans, file_bytes, "int8")


class Float32Layout(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Patches of `float32.onnx`."""

    layers: Annotated[tuple[Float32Layer, ...], Meta(max_length=_MAX_PATCHES)]
    tensors: Annotated[tuple[FloatTensor, ...], Meta(max_length=_MAX_PATCHES)] = ()

    def check(self, params_size: int, buffers_size: int, file_bytes: int) -> None:
        """Raises `BundleError` where a source or a place is out of bounds, or two places overlap."""
        for layer in self.layers:
            layer.source.check(params_size, buffers_size)
            has_place = layer.bias_at is not None
            _require(has_place == layer.source.has_bias, f"{layer.source.name} has half a bias")
        for tensor in self.tensors:
            tensor.check(params_size, buffers_size)
        patches: tuple[_Patch, ...] = (*self.layers, *self.tensors)
        spans = [span for patch in patches for span in patch.spans()]
        _check_spans(spans, file_bytes, "float32")


def _check_spans(spans: list[Span], file_bytes: int, what: str) -> None:
    end = 0
    for at, size in sorted(spans):
        _require(at >= end, f"two patches of the {what} template overlap")
        end = at + size
    _require(end <= file_bytes, f"a patch lies behind the end of the {what} template")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BundleError(f"manifest: {message}")
