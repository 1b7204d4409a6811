"""Activation ranges for new parameters in one run: `ranges.onnx` gives minimum and maximum of every
tensor that the int8 file quantizes, with the parameters as inputs, so nothing is exported again (stale
ranges cost 30 dB of SNR).

Laws of the file: the graph stays in the cloud; ranges are those of `quantize_static`'s MinMax up to the
rounding of float32 kernels; the order of rows is that of `Int8Layout.ranges`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from models import ort
from models.quantize.canonical import to_bytes
from models.quantize.inference_graph import INPUT_NAME, InferenceGraph
from wire.errors import DataError, ModelError
from wire.manifest import TensorSlot

Floats = npt.NDArray[np.float32]

_BATCH = 256


def ranges_graph(graph: InferenceGraph, tensors: Sequence[str]) -> bytes:
    """`ranges.onnx`: inputs `x`, `params`, `buffers`; outputs `low` and `high`, float32 [R].

    Args:
        graph: the module's inference graph.
        tensors: names of the observed tensors, in the order of the rows.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    inside = model.graph
    nodes: list[onnx.NodeProto] = []
    used = {value.name for value in inside.input}
    for name, (vector, slot) in graph.slots().items():
        if name in used:
            nodes += _slice(inside, name, vector, slot)
    nodes += list(inside.node)
    for side, reduce in (("low", "ReduceMin"), ("high", "ReduceMax")):
        nodes += _observe(inside, side, reduce, tensors)
    sizes = {"params": graph.params, "buffers": graph.buffers}
    kept = [value for value in inside.input if value.name == INPUT_NAME]
    for vector, slots in sizes.items():
        shape = [sum(slot.size for slot in slots)]
        if shape[0]:
            kept.append(helper.make_tensor_value_info(vector, TensorProto.FLOAT, shape))
    del inside.node[:], inside.input[:], inside.output[:]
    inside.node.extend(nodes)
    inside.input.extend(kept)
    for side in ("low", "high"):
        inside.output.append(helper.make_tensor_value_info(side, TensorProto.FLOAT, [len(tensors)]))
    return to_bytes(model)


class Calibrator:
    """Measures ranges. Holds one session; make one and keep it."""

    def __init__(self, ranges_onnx: bytes) -> None:
        self._session = ort.make_session(ranges_onnx)

    def ranges(self, params: Floats, buffers: Floats, windows: Floats) -> Floats:
        """Ranges of every quantized activation.

        Args:
            params: float32 [P].
            buffers: float32 [Q].
            windows: float32 [N, …], the calibration samples; memory grows with 256 of them at most.

        Returns:
            float32 [R, 2], (min, max).

        Raises:
            DataError: (operator) no windows.
            ModelError: the shapes do not fit, or an activation is not finite.
        """
        if not len(windows):
            raise DataError("calibration needs at least one window")
        lows, highs = [], []
        for at in range(0, len(windows), _BATCH):
            feeds = {INPUT_NAME: windows[at : at + _BATCH], "params": params, "buffers": buffers}
            found = ort.run(self._session, feeds)
            lows.append(found["low"])
            highs.append(found["high"])
        ranges = np.stack([np.min(lows, axis=0), np.max(highs, axis=0)], axis=1).astype(np.float32)
        if not np.isfinite(ranges).all():
            raise ModelError("an activation is not finite on the calibration windows")
        return ranges


def _slice(inside: onnx.GraphProto, name: str, vector: str, slot: TensorSlot) -> list[onnx.NodeProto]:
    bounds = {"from": [slot.offset], "to": [slot.offset + slot.size], "shape": list(slot.shape)}
    for suffix, values in bounds.items():
        inside.initializer.append(numpy_helper.from_array(np.array(values, np.int64), f"{name}:{suffix}"))
    return [
        helper.make_node("Slice", [vector, f"{name}:from", f"{name}:to"], [f"{name}:flat"]),
        helper.make_node("Reshape", [f"{name}:flat", f"{name}:shape"], [name]),
    ]


def _observe(inside: onnx.GraphProto, side: str, reduce: str, tensors: Sequence[str]) -> list[onnx.NodeProto]:
    inside.initializer.append(numpy_helper.from_array(np.array([1], np.int64), f"{side}:one"))
    nodes = []
    for tensor in tensors:
        nodes.append(helper.make_node(reduce, [tensor], [f"{tensor}:{side}:scalar"], keepdims=0))
        nodes.append(
            helper.make_node("Reshape", [f"{tensor}:{side}:scalar", f"{side}:one"], [f"{tensor}:{side}"])
        )
    nodes.append(helper.make_node("Concat", [f"{tensor}:{side}" for tensor in tensors], [side], axis=0))
    return nodes
