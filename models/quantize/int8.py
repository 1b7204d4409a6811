"""Static int8 quantization of a float32 graph, and the template that a device fills with parameters.

Choices, and why: QDQ, one scale per output channel, MinMax ranges, uint8 activations and int8 weights:
the pair that onnxruntime runs fast on both x86 and ARM. Weights keep to 7 bits (`reduce_range`): without
VNNI, x86 adds two uint8 × int8 products into 16 bits and *saturates* with 8-bit weights (255·127·2 >
32,767 ≥ 255·64·2), so the same file would answer differently on another device, and its golden check
would fail there. Only what runs in an integer kernel is quantized: the layers of `FloatGraph`, the ReLU
that melts into one, and pools, reshapes, additions between layers; the rest would pay for Q and DQ nodes
with time and accuracy. Law of the file: `quantize_static` writes the graph; nothing here invents a
number.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from models import ort
from models.quantize.canonical import raw_data_places, to_bytes
from models.quantize.float_graph import FloatGraph
from models.quantize.inference_graph import INPUT_NAME
from wire.errors import ModelError
from wire.manifest_layout import FloatTensor, Int8Layer, Int8Layout, Int8Range

Floats = npt.NDArray[np.float32]

WEIGHT_MAX = 64
_BATCH = 64
_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
_REMOVABLE = frozenset({"Relu", "Clip"})
_MOVERS = frozenset({"MaxPool", "AveragePool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"})
_INTEGER = frozenset({"GlobalAveragePool", "Add", "Concat"})
_PREPARED = {"onnx.quant.pre_process": "onnxruntime.quant"}


@dataclass(frozen=True)
class StaticModel:
    """What `quantize_static` made: the file in canonical form and the range of each quantized activation.

    Attributes:
        data: the int8 file with its parameters.
        ranges: float32 (min, max) by tensor name, of every tensor that was observed.
    """

    data: bytes
    ranges: dict[str, tuple[np.float32, np.float32]]


def quantize_static(model: bytes, nodes: frozenset[str], windows: Floats) -> StaticModel:
    """onnxruntime's own static quantization of a float32 file.

    Args:
        model: float32 ONNX with its parameters.
        nodes: names of the nodes to quantize (`quantizable_nodes`).
        windows: float32 [N, …], the calibration samples.

    Raises:
        ModelError: (operator) nothing can be quantized, or there are no windows.
    """
    if not nodes or not len(windows):
        raise ModelError("there is no layer to quantize, or no calibration window", nodes=len(nodes))
    quantizer = ort.load_quantizer()
    prepared = onnx.load_from_string(model)
    # Without this mark onnxruntime logs an advice about its own preprocessing, which would merge our
    # initializers.
    onnx.helper.set_model_props(prepared, _PREPARED)
    types = sorted({node.op_type for node in prepared.graph.node if node.name in nodes})
    with tempfile.TemporaryDirectory(prefix="shoal-quantize-") as folder:
        source, target, cache = (Path(folder, name) for name in ("float32.onnx", "int8.onnx", "ranges.json"))
        onnx.save(prepared, source)
        quantizer.quantize_static(
            source,
            target,
            _Reader(windows),
            quant_format=quantizer.QuantFormat.QDQ,
            op_types_to_quantize=types,
            nodes_to_quantize=sorted(nodes),
            per_channel=True,
            reduce_range=True,
            activation_type=quantizer.QuantType.QUInt8,
            weight_type=quantizer.QuantType.QInt8,
            calibrate_method=quantizer.CalibrationMethod.MinMax,
            calibration_cache_path=cache,
            # A product's output is added to a float bias next: leaving it as it is spares a rounding.
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
        observed = quantizer.calibrate.load_tensors_data(cache)
        result = onnx.load(target)
    ranges = {
        name: (np.float32(data.range_value[0].item()), np.float32(data.range_value[1].item()))
        for name, data in observed.items()
    }
    return StaticModel(to_bytes(result), ranges)


def quantizable_nodes(graph: FloatGraph) -> frozenset[str]:
    """Names of the nodes that run in integer arithmetic between layers, and of the layers."""
    return _Selection(graph).run()


def int8_template(graph: FloatGraph, static: StaticModel) -> tuple[bytes, Int8Layout, Floats]:
    """`template.onnx` (patched bytes are zero), where they lie, and float32 [R, 2] ranges in that order."""
    model = onnx.load_from_string(static.data)
    places = {name: at for name, (at, _) in raw_data_places(static.data).items()}
    producer = {name: node for node in model.graph.node for name in node.output}
    nodes = {node.name: node for node in model.graph.node}
    rows: dict[str, Int8Range] = {}
    for scale, zero_point in _activation_slots(model):
        tensor = scale.removesuffix("_scale")
        if scale not in rows:
            rows[scale] = Int8Range(
                range=len(rows), tensor=tensor, scale_at=places[scale], zero_point_at=places[zero_point]
            )
    layers = []
    for layer in graph.layers:
        entry = producer[nodes[layer.node].input[0]]
        bias = f"{layer.bias}_quantized"
        layers.append(
            Int8Layer(
                source=layer.source,
                weight_at=places[f"{layer.weight}_quantized"],
                scale_at=places[f"{layer.weight}_scale"],
                bias_at=places[bias] if layer.bias else None,
                bias_scale_at=places[f"{bias}_scale"] if layer.bias else None,
                input_range=rows[entry.input[1]].range,
            )
        )
    tensors = tuple(placed.tensor(places[name]) for name, placed in graph.tensors.items())
    layout = Int8Layout(
        weight_max=WEIGHT_MAX, layers=tuple(layers), ranges=tuple(rows.values()), tensors=tensors
    )
    ranges = np.array([static.ranges[row.tensor] for row in layout.ranges], np.float32).reshape(-1, 2)
    return _zeroed(static.data, layout), layout, ranges


class _Reader:
    """The calibration windows, batch by batch, as onnxruntime's calibrator asks for them."""

    def __init__(self, windows: Floats) -> None:
        self._batches = iter(windows[at : at + _BATCH] for at in range(0, len(windows), _BATCH))

    def get_next(self) -> dict[str, Floats] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT_NAME: batch}


class _Selection:
    """Which nodes to quantize: layers, and what stands between them and has an integer kernel."""

    def __init__(self, graph: FloatGraph) -> None:
        self.nodes = list(graph.model.graph.node)
        self.layers = {layer.node for layer in graph.layers}
        self.outputs = {value.name for value in graph.model.graph.output}
        self.producer = {name: node for node in self.nodes for name in node.output}

    def run(self) -> frozenset[str]:
        chosen = set(self.layers)
        for node in self.nodes:
            if node.name not in chosen and self._can_follow(node, chosen):
                chosen.add(node.name)
        while True:
            kept = {node.name for node in self.nodes if node.name in chosen and self._can_stay(node, chosen)}
            if kept == chosen:
                return frozenset(chosen)
            chosen = kept

    def _sources(self, node: onnx.NodeProto) -> list[onnx.NodeProto | None]:
        count = len(node.input) if node.op_type in _INTEGER else 1
        return [self.producer.get(name) for name in node.input[:count]]

    def _is_integer(self, node: onnx.NodeProto | None, chosen: set[str]) -> bool:
        # A MatMul's output stays float32, so nothing behind it is integer.
        return node is not None and node.name in chosen and node.op_type != "MatMul"

    def _can_follow(self, node: onnx.NodeProto, chosen: set[str]) -> bool:
        if node.op_type not in _REMOVABLE | _MOVERS | _INTEGER:
            return False
        if not all(self._is_integer(source, chosen) for source in self._sources(node)):
            return False
        if node.op_type in _REMOVABLE:
            # It melts into the operator before it only where nobody else reads that one's output; an operator
            # that moves values has no scale of its own to melt into.
            (source,) = self._sources(node)
            can_melt = source is not None and source.op_type not in _MOVERS | _REMOVABLE
            return can_melt and len(self._readers(node.input[0])) == 1 and not self.outputs & set(node.output)
        return True

    def _can_stay(self, node: onnx.NodeProto, chosen: set[str]) -> bool:
        if node.name in self.layers:
            return True
        if not all(self._is_integer(source, chosen) for source in self._sources(node)):
            return False
        if node.op_type in _REMOVABLE and self.producer[node.input[0]].name in self.layers:
            return True
        # One integer reader is enough: it quantizes the value anyway.
        return any(reader.name in chosen for reader in self._readers(node.output[0]))

    def _readers(self, tensor: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if tensor in node.input]


def _activation_slots(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            yield node.input[1], node.input[2]


def _zeroed(data: bytes, layout: Int8Layout) -> bytes:
    out = bytearray(data)
    patches: tuple[Int8Layer | Int8Range | FloatTensor, ...]
    patches = (*layout.layers, *layout.ranges, *layout.tensors)
    for patch in patches:
        for at, size in patch.spans():
            out[at : at + size] = bytes(size)
    return bytes(out)
