"""The float32 inference graph as layers and tensors whose values can be patched: BatchNorm folded,
weights in place.

Laws of the file: the graph says what is folded where, no value is computed here (`wire/materialize.py`
does, on both sides of the wire). Each layer has a weight and a bias of its own: a tensor that two nodes
share is given out twice. A layer is a Conv, Gemm or MatMul whose weight (and bias, if it has one) is a
trainable parameter; everything else, such as a frozen layer, LayerNorm, an attention product or a
ConvTranspose, stays float32 in both templates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import numpy_helper

from models.quantize.canonical import raw_data_places, to_bytes
from models.quantize.inference_graph import InferenceGraph
from wire.manifest import TensorSlot
from wire.manifest_layout import Float32Layer, Float32Layout, FloatTensor, Fold, LayerSource

_TRANSPOSED = (1, 0)


@dataclass(frozen=True)
class Layer:
    """A node that can run in int8: its name, its source, and the names of its two initializers."""

    node: str
    source: LayerSource
    weight: str
    bias: str | None


@dataclass(frozen=True)
class Placed:
    """An initializer that holds a tensor of `params` or `buffers`, perhaps with its two axes swapped."""

    vector: str
    slot: TensorSlot
    transpose: bool = False

    def tensor(self, at: int) -> FloatTensor:
        """The patch at a place."""
        return FloatTensor(
            name=self.slot.name,
            source="params" if self.vector == "params" else "buffers",
            offset=self.slot.offset,
            shape=self.slot.shape,
            transpose=self.transpose,
            at=at,
        )


@dataclass(frozen=True, eq=False)
class FloatGraph:
    """A graph with one input, zeros for its parameters, and what belongs in their places.

    Attributes:
        model: float32; every parameter is an initializer of zeros.
        layers: in the order of the graph.
        tensors: initializer name to what it holds; without the initializers of layers.
    """

    model: onnx.ModelProto
    layers: tuple[Layer, ...]
    tensors: dict[str, Placed]


def build_float_graph(graph: InferenceGraph) -> FloatGraph:
    """Turns the parameter inputs of an inference graph into patchable initializers."""
    return _Builder(graph).build()


def float32_template(graph: FloatGraph) -> tuple[bytes, Float32Layout]:
    """`float32.onnx` (its patchable bytes are zero) and where they lie."""
    data = to_bytes(graph.model)
    places = {name: at for name, (at, _) in raw_data_places(data).items()}
    layers = []
    tensors = [placed.tensor(places[name]) for name, placed in graph.tensors.items()]
    for layer in graph.layers:
        bias_at = None if layer.bias is None else places[layer.bias]
        layers.append(Float32Layer(source=layer.source, weight_at=places[layer.weight], bias_at=bias_at))
    return data, Float32Layout(layers=tuple(layers), tensors=tuple(tensors))


class _Builder:
    """Works on a copy of the graph; `placed` holds the initializers that nodes read."""

    def __init__(self, graph: InferenceGraph) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(graph.model)
        self.nodes = list(self.model.graph.node)
        self.outputs = {value.name for value in self.model.graph.output}
        self.placed = {name: Placed(vector, slot) for name, (vector, slot) in graph.slots().items()}
        self.layers: list[Layer] = []

    def build(self) -> FloatGraph:
        self._place_transposes()
        for node in list(self.nodes):
            self._take_layer(node)
        used = {name for node in self.nodes for name in node.input}
        inside = {name for layer in self.layers for name in (layer.weight, layer.bias) if name is not None}
        tensors = {name: self.placed[name] for name in self.placed if name in used - inside}
        for name, placed in tensors.items():
            self._add_initializer(name, placed.slot.shape[::-1] if placed.transpose else placed.slot.shape)
        self._finish()
        return FloatGraph(self.model, tuple(self.layers), tensors)

    def _place_transposes(self) -> None:
        for node in list(self.nodes):
            if node.op_type != "Transpose" or node.input[0] not in self.placed:
                continue
            placed = self.placed[node.input[0]]
            perm = tuple(_attributes(node).get("perm", ()))
            if perm == _TRANSPOSED and not placed.transpose and node.output[0] not in self.outputs:
                self.placed[node.output[0]] = replace(placed, transpose=True)
                self.nodes.remove(node)

    def _take_layer(self, node: onnx.NodeProto) -> None:
        axis = _channel_axis(node)
        if axis is None or node.input[1] not in self.placed or node.input[0] in self.placed:
            return
        weight = self.placed[node.input[1]]
        bias = self._param(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        has_foreign_bias = len(node.input) > 2 and node.input[2] != "" and bias is None
        if weight.vector != "params" or len(weight.slot.shape) < 2 or has_foreign_bias:
            return
        if node.op_type != "Conv" and len(weight.slot.shape) != 2:
            return
        channel_axis = 1 - axis if weight.transpose else axis
        source = LayerSource(
            name=node.name,
            weight=weight.slot.offset,
            shape=weight.slot.shape,
            channel_axis=0 if channel_axis == 0 else 1,
            transpose=weight.transpose,
            bias=None if bias is None else bias.offset,
        )
        if bias is not None and bias.shape != (source.channels,):
            return
        source = self._folded(node, source)
        layer = Layer(
            node=node.name,
            source=source,
            weight=f"{node.name}.weight",
            bias=f"{node.name}.bias" if source.has_bias else None,
        )
        self._add_initializer(layer.weight, source.shape[::-1] if source.transpose else source.shape)
        inputs = [node.input[0], layer.weight]
        if layer.bias is not None:
            self._add_initializer(layer.bias, (source.channels,))
            inputs.append(layer.bias)
        del node.input[:]
        node.input.extend(inputs)
        self.layers.append(layer)

    def _folded(self, node: onnx.NodeProto, source: LayerSource) -> LayerSource:
        """The source with the BatchNorm behind the node folded in, if there is one that can be."""
        readers = [other for other in self.nodes if node.output[0] in other.input]
        if node.op_type == "MatMul" or len(readers) != 1 or node.output[0] in self.outputs:
            return source
        norm = readers[0]
        if norm.op_type != "BatchNormalization" or norm.input[0] != node.output[0]:
            return source
        slots = [self.placed.get(name) for name in norm.input[1:5]]
        wanted = ("params", "params", "buffers", "buffers")
        if any(slot is None or slot.vector != vector for slot, vector in zip(slots, wanted, strict=True)):
            return source
        gamma, beta, mean, variance = (slot.slot.offset for slot in slots if slot is not None)
        epsilon = float(_attributes(norm).get("epsilon", 1e-5))
        node.output[0] = norm.output[0]
        self.nodes.remove(norm)
        fold = Fold(gamma=gamma, beta=beta, mean=mean, variance=variance, epsilon=epsilon)
        return msgspec.structs.replace(source, fold=fold)

    def _param(self, name: str) -> TensorSlot | None:
        placed = self.placed.get(name)
        return placed.slot if placed is not None and placed.vector == "params" else None

    def _add_initializer(self, name: str, shape: tuple[int, ...]) -> None:
        self.model.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))

    def _finish(self) -> None:
        graph = self.model.graph
        kept = [value for value in graph.input if value.name not in self.placed]
        del graph.input[:], graph.node[:]
        graph.input.extend(kept)
        graph.node.extend(self.nodes)


def _channel_axis(node: onnx.NodeProto) -> int | None:
    """Axis of the weight, as the node sees it, that counts output channels; None if the node is no layer."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "MatMul":
        return 1
    attributes = _attributes(node)
    is_plain = attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0
    if node.op_type == "Gemm" and is_plain and not attributes.get("transA", 0):
        return 0 if attributes.get("transB", 0) else 1
    return None


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
