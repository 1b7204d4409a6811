"""A traced step as ONNX bytes that depend on the mathematics alone.

torch's exporter does the translation; `strip` then removes everything that differs from run to run or machine
to machine (stack traces, names of tracer nodes, versions), so that equal steps have equal bytes and hashes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence

import onnx
import onnx_ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from torch import Tensor, fx

from models.train_step.step import PER_SAMPLE_INPUTS, STEP_INPUTS, STEP_OUTPUTS
from models.train_step.translations import onnx_translations
from wire.errors import UnsupportedLayerError


def step_to_onnx(graph: fx.GraphModule, example: Sequence[Tensor]) -> onnx.ModelProto:
    """Translate a traced step.

    Args:
        graph: from `trace_step`.
        example: the inputs that it was traced with, in the order of `STEP_INPUTS`.

    Returns:
        A stripped model with those inputs and `STEP_OUTPUTS`; inputs that it does not use are still listed.

    Raises:
        UnsupportedLayerError: an operator has no translation; the message names it.
    """
    return to_onnx(graph, dict(zip(STEP_INPUTS, example, strict=True)), STEP_OUTPUTS, PER_SAMPLE_INPUTS)


def to_onnx(
    graph: fx.GraphModule, example: Mapping[str, Tensor], outputs: Sequence[str], per_sample: Sequence[str]
) -> onnx.ModelProto:
    """Translate what `trace` gave, with the same `example` and `per_sample`; `outputs` names what it returns.

    Raises:
        UnsupportedLayerError: as `step_to_onnx`.
    """
    batch = torch.export.Dim("batch", min=2)
    shapes = tuple({0: batch} if name in per_sample else None for name in example)
    try:
        with _quiet():
            program = torch.onnx.export(
                graph,
                tuple(example.values()),
                dynamo=True,
                verbose=False,
                optimize=False,
                input_names=list(example),
                output_names=list(outputs),
                dynamic_shapes=shapes,
                custom_translation_table=onnx_translations(),
            )
    except torch.onnx.OnnxExporterError as error:
        raise _unsupported(error) from error
    if program is None:
        raise UnsupportedLayerError("torch's exporter gave no graph", layer="", substitute="")
    _fold(program.model)
    return strip(program.model_proto)


def _fold(model: onnx_ir.Model) -> None:
    """Compute what is constant and share what is equal: the exporter's own rewriting takes longer than the export."""
    common.InlinePass()(model)
    fold_constants(model)
    for clean in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        clean(model)


def strip(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove what is not mathematics and rename every inner value by position, in place."""
    model.producer_name = model.producer_version = model.doc_string = ""
    graph = model.graph
    graph.doc_string = ""
    graph.name = "step"
    for record in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del record.metadata_props[:]
    del graph.value_info[:]
    _rename(graph)
    return model


def _rename(graph: onnx.GraphProto) -> None:
    names = {value.name: value.name for value in (*graph.input, *graph.output)}
    names[""] = ""
    for number, tensor in enumerate(graph.initializer):
        if tensor.name not in names:
            names[tensor.name] = f"constant_{number}"
        tensor.name = names[tensor.name]
    for number, node in enumerate(graph.node):
        node.name = node.doc_string = ""
        # The exporter's order of attributes follows a set, which differs from process to process.
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        del node.attribute[:]
        node.attribute.extend(attributes)
        for place, name in enumerate(node.output):
            names.setdefault(name, f"value_{number}_{place}")
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [names[name] for name in node.output]


def _unsupported(error: BaseException) -> UnsupportedLayerError:
    """The exporter's chain of errors ends at the operator that it does not know."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    reason = str(root).splitlines()[0]
    named = re.search(r"op='([^']+)'", reason)
    return UnsupportedLayerError(
        f"ONNX cannot express {named[1]}" if named else f"the train step cannot be written in ONNX: {reason}",
        hint="replace what uses it in forward; models.train_step.SUPPORTED_LAYERS lists what is known to work",
        layer=named[1] if named else reason,
        substitute="",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks through print, warnings and logs; none of it is for an operator."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
