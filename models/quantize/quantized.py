"""A module quantized: both templates, their layouts, the range graph, and what onnxruntime made of the same
parameters.

Law of the file: the range graph is compared with onnxruntime's own calibration before anyone uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from models import flat
from models.evaluate import answers_of
from models.quantize.float_graph import build_float_graph, float32_template
from models.quantize.inference_graph import export_inference
from models.quantize.int8 import int8_template, quantizable_nodes, quantize_static
from models.quantize.ranges import Calibrator, ranges_graph
from wire.checkpoint import Checkpoint
from wire.errors import ModelError
from wire.manifest import TensorSlot
from wire.manifest_layout import Float32Layout, Int8Layout
from wire.materialize import fill_float32

Floats = npt.NDArray[np.float32]

# Of a range's width: the graphs differ in the order of float32 sums and in where BatchNorm is folded.
_RANGE_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Quantized:
    """All that a bundle needs of the inference side.

    Attributes:
        template, int8_layout: the int8 template and its patches.
        float32, float32_layout: the float32 template and its patches.
        ranges_graph: `ranges.onnx`.
        checkpoint: the module's parameters with onnxruntime's own ranges.
        reference: the int8 file that `quantize_static` wrote for the checkpoint, in canonical form.
        params, buffers: layout of the two vectors.
        output_shape: of one sample's answer.
    """

    template: bytes
    int8_layout: Int8Layout
    float32: bytes
    float32_layout: Float32Layout
    ranges_graph: bytes
    checkpoint: Checkpoint
    reference: bytes
    params: tuple[TensorSlot, ...]
    buffers: tuple[TensorSlot, ...]
    output_shape: tuple[int, ...]


def quantize(module: nn.Module, input_shape: tuple[int, ...], output_name: str, windows: Floats) -> Quantized:
    """Exports, folds, quantizes and calibrates.

    Args:
        module: trained, float32; not changed.
        input_shape: of one sample.
        output_name: of the graph's only output.
        windows: float32 [N, *input_shape], the calibration samples.

    Raises:
        ModelError: (operator) the module cannot be exported or quantized, or a graph differs from torch.
        BundleError: (operator) a parameter is not finite.
    """
    exported = export_inference(module, input_shape, output_name)
    graph = build_float_graph(exported)
    float32, float32_layout = float32_template(graph)
    params, buffers = flat.flatten_params(module), flat.flatten_buffers(module)
    plain = Checkpoint(params, buffers, np.zeros((0, 2), np.float32))
    filled = fill_float32(float32, float32_layout, plain)
    static = quantize_static(filled, quantizable_nodes(graph), windows)
    template, int8_layout, ranges = int8_template(graph, static)
    observed = ranges_graph(exported, [row.tensor for row in int8_layout.ranges])
    _compare_ranges(Calibrator(observed).ranges(params, buffers, windows), ranges)
    return Quantized(
        template=template,
        int8_layout=int8_layout,
        float32=float32,
        float32_layout=float32_layout,
        ranges_graph=observed,
        checkpoint=Checkpoint(params, buffers, ranges),
        reference=static.data,
        params=exported.params,
        buffers=exported.buffers,
        output_shape=answers_of(filled, windows[:1]).shape[1:],
    )


def _compare_ranges(found: Floats, wanted: Floats) -> None:
    width = np.maximum(wanted[:, 1] - wanted[:, 0], np.finfo(np.float32).tiny)
    difference = float((np.abs(found - wanted).max(axis=1) / width).max(initial=0.0))
    if not difference <= _RANGE_TOLERANCE:
        raise ModelError(
            f"ranges of the range graph differ from onnxruntime's by {difference:g} of their width",
            difference=difference,
        )
