"""A torch module's inference as an ONNX graph whose parameters are still inputs.

Laws of the file: the module is exported in evaluation mode and compared with torch at two batch sizes
before anyone sees the graph. Parameters enter as graph inputs, because an exporter that sees their
values folds BatchNorm into weights, transposes them and merges equal ones (two fresh LayerNorms), and
nothing can be patched any more.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from models import flat, ort
from models.quantize.canonical import to_canonical
from wire.errors import ModelError
from wire.manifest import TensorSlot

INPUT_NAME = "x"
BATCH = "batch"
_BATCH_SIZES = (1, 5)
# float32 against float32 through other kernels; a wrong graph is off by far more.
_RELATIVE_TOLERANCE = 1e-3
# onnxscript's rewriter compares constants with this absolute tolerance.
_LOST_TERM = 1e-8


@dataclass(frozen=True, eq=False)
class InferenceGraph:
    """A graph `output = f(x, params.*, buffers.*)` with a dynamic first axis called `batch`.

    Attributes:
        model: inputs are `x`, then `params.{slot}` and `buffers.{slot}` where the graph uses them.
        params, buffers: the layout of the two flat vectors.
        output_name: `logits` or `reconstruction`.
    """

    model: onnx.ModelProto
    params: tuple[TensorSlot, ...]
    buffers: tuple[TensorSlot, ...]
    output_name: str

    def slots(self) -> dict[str, tuple[str, TensorSlot]]:
        """(`params` or `buffers`, slot) by the name of the graph input."""
        found = {f"params.{slot.name}": ("params", slot) for slot in self.params}
        return found | {f"buffers.{slot.name}": ("buffers", slot) for slot in self.buffers}


def export_inference(module: nn.Module, input_shape: tuple[int, ...], output_name: str) -> InferenceGraph:
    """Exports a module's evaluation mode.

    Args:
        module: not changed; in any mode, on the CPU.
        input_shape: of one sample, without the batch axis.
        output_name: name of the graph's only output.

    Raises:
        ModelError: (operator) torch cannot export the module, or the graph answers otherwise than torch.
    """
    # A copy: functional_call swaps tensors in and out of it while the export runs.
    own = copy.deepcopy(module).eval()
    tensors = {f"params.{name}": value for name, value in flat.params_of(own).items()}
    tensors |= {f"buffers.{name}": value for name, value in flat.buffers_of(own).items()}
    model = _export(_Stateless(own, tuple(tensors)), input_shape, tensors, output_name)
    graph = InferenceGraph(model, flat.param_slots(own), flat.buffer_slots(own), output_name)
    _compare(graph, own, input_shape, tensors)
    return graph


class _Stateless(nn.Module):
    """`f(x, tensors)`; the module is hidden in a list so that its own tensors are not the graph's."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.hidden = [module]
        self.names = [name.split(".", 1)[1] for name in names]

    def forward(self, x: Tensor, tensors: list[Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(
            self.hidden[0], dict(zip(self.names, tensors, strict=True)), (x,)
        )
        return result


def _export(
    module: nn.Module, input_shape: tuple[int, ...], tensors: dict[str, Tensor], output_name: str
) -> onnx.ModelProto:
    values = [value.detach().clone() for value in tensors.values()]
    batch = torch.export.Dim(BATCH)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (torch.zeros(2, *input_shape), values),
                dynamo=True,
                verbose=False,
                input_names=[INPUT_NAME, *tensors],
                output_names=[output_name],
                dynamic_shapes=({0: batch}, [{} for _ in values]),
            )
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ModelError(
            f"torch cannot export the module for inputs of {input_shape}: {error}",
            hint="forward() must take one tensor [batch, ...], return one, and not branch on values",
        ) from error
    if program is None or len(program.model_proto.graph.output) != 1:
        raise ModelError("the module must return one tensor")
    _refuse_lost_terms(program)
    return _without_unused_inputs(to_canonical(program.model_proto))


def _refuse_lost_terms(program: torch.onnx.ONNXProgram) -> None:
    """The exporter leaves `+ 1e-8` out as if it were 0, which no comparison on random inputs shows."""
    nodes = [] if program.exported_program is None else program.exported_program.graph.nodes
    for node in nodes:
        if getattr(node.target, "overloadpacket", None) not in (torch.ops.aten.add, torch.ops.aten.sub):
            continue
        for term in node.args:
            if isinstance(term, float) and 0.0 < abs(term) <= _LOST_TERM:
                raise ModelError(
                    f"the module adds {term:g}, which torch's exporter leaves out of the graph",
                    hint="use 1e-6 or more, or torch.clamp",
                    term=term,
                )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks of its progress and of torchvision on stdout, stderr and through warnings."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _without_unused_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    used = {name for node in model.graph.node for name in node.input}
    kept = [value for value in model.graph.input if value.name in used or value.name == INPUT_NAME]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


def _compare(
    graph: InferenceGraph, module: nn.Module, input_shape: tuple[int, ...], tensors: dict[str, Tensor]
) -> None:
    session = ort.make_session(graph.model.SerializeToString())
    feeds = {name: value.detach().numpy() for name, value in tensors.items()}
    rng = np.random.default_rng(0)
    for size in _BATCH_SIZES:
        x = rng.standard_normal((size, *input_shape)).astype(np.float32)
        with torch.no_grad():
            wanted = module(torch.from_numpy(x)).numpy()
        found = ort.run(session, {INPUT_NAME: x, **feeds})[graph.output_name]
        if found.shape != wanted.shape:
            raise ModelError(f"the exported graph answers {found.shape}, torch {wanted.shape}")
        difference = float(np.abs(found - wanted).max(initial=0.0))
        if not difference <= _RELATIVE_TOLERANCE * max(1.0, float(np.abs(wanted).max(initial=0.0))):
            raise ModelError(
                f"the exported graph differs from torch by {difference:g} at batch size {size}",
                hint="a layer of the model is exported wrongly, or draws random numbers in evaluation mode",
                difference=difference,
            )
