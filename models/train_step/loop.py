"""K optimizer steps in one run: a step's graph as the body of an ONNX `Loop`.

Each iteration gathers its batch by `index[k]` from the samples given to the run, so the state never leaves
onnxruntime between steps. Constants of the step stay outside of the body, where onnxruntime folds and packs
them once.
Source: docs/architecture.md, "Train step graph".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STATES = ("params", "opt_state", "buffers")
GATHERED = {
    "x": ("x", "index_k"),
    "y": ("y", "index_k"),
    "weights": ("weights", "iteration"),
    "noise": ("noise", "iteration"),
}
SCALARS = ("lr", "momentum", "weight_decay", "mu")


def wrap_in_loop(step: onnx.ModelProto, sizes: Sequence[int], input_shape: Sequence[int]) -> onnx.ModelProto:
    """Build the train step graph of the contract.

    Args:
        step: one step, from `step_to_onnx`.
        sizes: lengths of params, opt_state and buffers: P, S, Q.
        input_shape: shape of one sample.

    Returns:
        A checked model whose inputs are those of the contract that the step uses, and whose outputs are
        `params_out`, `opt_state_out`, `buffers_out`, `loss` and `metric`.
    """
    lengths = dict(zip(STATES, sizes, strict=True))
    carried = [name for name in STATES if lengths[name] > 0]
    steps = _live_nodes(step.graph, [*(f"{name}_out" for name in carried), "loss", "metric"])
    used = {name for node in steps for name in _read_by(node)}
    body = _body(steps, carried, lengths, used)
    nodes = [
        helper.make_node("Shape", ["index"], ["index_rows"], start=0, end=1),
        helper.make_node("Squeeze", ["index_rows"], ["steps"]),
        helper.make_node(
            "Loop",
            ["steps", "", *carried],
            [f"{name}_out" for name in carried] + ["loss", "metric"],
            body=body,
        ),
    ]
    constants = [tensor for tensor in step.graph.initializer if tensor.name in used]
    empty = np.zeros(0, np.float32)
    constants += [numpy_helper.from_array(empty, f"{name}_out") for name in STATES if name not in carried]
    graph = helper.make_graph(
        nodes, "train_step", _inputs(carried, lengths, input_shape, used), _outputs(lengths), constants
    )
    model = helper.make_model(graph, opset_imports=list(step.opset_import), ir_version=step.ir_version)
    model.producer_name = model.producer_version = ""
    onnx.checker.check_model(model)
    return model


def _live_nodes(graph: onnx.GraphProto, outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that the outputs depend on, in the graph's order."""
    wanted = set(outputs)
    live = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(_read_by(node))
            live.append(node)
    return live[::-1]


def _read_by(node: onnx.NodeProto) -> set[str]:
    """What a node takes, and what the graphs inside of it take from around it."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            names.update(*(_read_by(inner) for inner in attribute.g.node))
    return names


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Gives the values that a node and the graphs inside of it read or make other names."""
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for attribute in node.attribute:
        for inner in attribute.g.node:
            _rename(inner, names)


def _body(
    steps: Sequence[onnx.NodeProto], carried: Sequence[str], lengths: dict[str, int], used: set[str]
) -> onnx.GraphProto:
    inner = {name: f"batch_{name}" for name in GATHERED} | {name: f"{name}_in" for name in carried}
    inner["step"] = "iteration"
    nodes = [
        helper.make_node("Gather", ["index", "iteration"], ["index_k"], axis=0),
        helper.make_node("Identity", ["condition"], ["condition_out"]),
    ]
    for name, (source, at) in GATHERED.items():
        if name in used:
            nodes.append(helper.make_node("Gather", [source, at], [inner[name]], axis=0))
    outputs = {f"{name}_out": f"{name}_next" for name in STATES}
    outputs |= {"loss": "loss_k", "metric": "metric_k"}
    for node in steps:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        _rename(copy, {**outputs, **inner})
        nodes.append(copy)
    floats = TensorProto.FLOAT
    value = helper.make_tensor_value_info
    inputs = [value("iteration", TensorProto.INT64, []), value("condition", TensorProto.BOOL, [])]
    inputs += [value(inner[name], floats, [lengths[name]]) for name in carried]
    results = [value("condition_out", TensorProto.BOOL, [])]
    results += [value(outputs[f"{name}_out"], floats, [lengths[name]]) for name in carried]
    results += [value(outputs["loss"], floats, []), value(outputs["metric"], floats, [])]
    return helper.make_graph(nodes, "step", inputs, results)


def _inputs(
    carried: Sequence[str], lengths: dict[str, int], input_shape: Sequence[int], used: set[str]
) -> list[onnx.ValueInfoProto]:
    floats, integers = TensorProto.FLOAT, TensorProto.INT64
    value = helper.make_tensor_value_info
    inputs = [value(name, floats, [lengths[name]]) for name in carried]
    inputs.append(value("x", floats, ["N", *input_shape]))
    if "y" in used:
        inputs.append(value("y", integers, ["N"]))
    inputs += [value("weights", floats, ["K", "B"]), value("index", integers, ["K", "B"])]
    inputs += [value(name, floats, []) for name in SCALARS if name in used]
    if "anchor" in used:
        inputs.append(value("anchor", floats, [lengths["params"]]))
    if "seed" in used:
        inputs.append(value("seed", integers, []))
    if "noise" in used:
        inputs.append(value("noise", floats, ["K", lengths["params"]]))
    return inputs


def _outputs(lengths: dict[str, int]) -> list[onnx.ValueInfoProto]:
    value = helper.make_tensor_value_info
    outputs = [value(f"{name}_out", TensorProto.FLOAT, [lengths[name]]) for name in STATES]
    return [*outputs, value("loss", TensorProto.FLOAT, ["K"]), value("metric", TensorProto.FLOAT, ["K"])]
