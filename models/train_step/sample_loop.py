"""DP-SGD sample by sample: an ONNX `Scan` over a batch, whose body is the gradient of one sample.

    total = Σ counts_i · clip(∇ loss_i, C)        by Scan, a batch of one at a time
    params, opt_state = descend(params, opt_state, total + noise)

A gradient is complete where it is clipped, whatever the layers are, so every model that has a train step has this one
(convolutions, norms within a sample, attention, recurrence), the batch size stays free, and memory does not grow with
it. What is the same for every sample is computed once for all of them. The price is that a batch's matrix products are
done one by one: a step of 32 samples takes one and a half to three times as long as a usual one.
Source: docs/architecture.md, "Train step graph".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.func import functional_call

from models.flat import buffer_slots, param_slots, split_flat
from models.task import Task
from models.train_step.onnx_export import to_onnx
from models.train_step.optimizers import Optimizer
from models.train_step.sample_privacy import (
    SamplePrivacy,
    build_descent,
    clip_factors,
    counted,
    mean_of,
)
from models.train_step.step import STEP_INPUTS, STEP_OUTPUTS, constants_of
from models.train_step.trace import trace

_PREFIX = "sample_"
# Of one sample, in the order of the function's arguments; the last is what the samples before have summed up to.
_SCANNED = {"x": "x", "y": "y", "weight": "weights"}
_OUTSIDE = frozenset({"params", "buffers"})
_SAMPLE_OUTPUTS = ("total_next", "loss", "metric")
_PER_SAMPLE = ("weights", "losses", "metrics")


def private_step_to_onnx(
    module: nn.Module,
    task: Task,
    optimizer: Optimizer,
    privacy: SamplePrivacy,
    example: Sequence[Tensor],
) -> onnx.ModelProto:
    """One private step, like what `step_to_onnx` gives.

    Args:
        example: from `example_inputs`.

    Raises:
        ModelError: the forward depends on values.
        UnsupportedLayerError: an operator has no translation.
    """
    values = dict(zip(STEP_INPUTS, example, strict=True))
    sample = _sample_model(module, task, privacy, values)
    descent = _descent_model(optimizer, privacy, values)
    constants = [*descent.graph.initializer, *_renamed_constants(sample.graph)]
    length = numpy_helper.from_array(np.array([values["params"].numel()], np.int64), "params_length")
    shared, own = _split_by_sample(sample.graph)
    nodes = [
        helper.make_node("ConstantOfShape", ["params_length"], ["no_gradient"]),
        *(_renamed_node(node) for node in shared),
        _scan(sample.graph, own),
        *descent.graph.node,
        helper.make_node("Identity", ["buffers"], ["buffers_out"]),
    ]
    infos = helper.make_tensor_value_info
    inputs = [infos(name, TensorProto.FLOAT, None) for name in STEP_INPUTS]
    outputs = [infos(name, TensorProto.FLOAT, None) for name in STEP_OUTPUTS]
    graph = helper.make_graph(nodes, "step", inputs, outputs, [*constants, length])
    return helper.make_model(graph, opset_imports=list(sample.opset_import), ir_version=sample.ir_version)


def _sample_model(
    module: nn.Module, task: Task, privacy: SamplePrivacy, values: Mapping[str, Tensor]
) -> onnx.ModelProto:
    """The clipped gradient of one sample, added to a sum."""
    slots, statistics = param_slots(module), buffer_slots(module)
    constants = constants_of(module)

    def add_gradient(
        params: Tensor, buffers: Tensor, total: Tensor, x: Tensor, y: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        leaf = params.detach().requires_grad_()
        fixed = {**split_flat(buffers, statistics), **{name: v.clone() for name, v in constants.items()}}
        outputs = functional_call(module, {**split_flat(leaf, slots), **fixed}, (x,))
        loss = task.sample_losses(outputs, x, y).sum()
        gradient = torch.autograd.grad(loss, leaf)[0]
        factor = counted(weight) * clip_factors((gradient * gradient).sum(), privacy.clipping_norm)
        metric = task.sample_metrics(outputs.detach(), x, y).sum()
        return total + factor * gradient, loss.detach(), metric

    example = {
        "params": values["params"],
        "buffers": values["buffers"],
        "total": torch.zeros_like(values["params"]),
        "x": values["x"][:1],
        "y": values["y"][:1],
        "weight": torch.ones(()),
    }
    return to_onnx(trace(add_gradient, example, ()), example, _SAMPLE_OUTPUTS, ())


def _descent_model(
    optimizer: Optimizer, privacy: SamplePrivacy, values: Mapping[str, Tensor]
) -> onnx.ModelProto:
    """What follows once the gradients are summed up."""
    descend = build_descent(optimizer, privacy)

    def finish(
        weights: Tensor,
        losses: Tensor,
        metrics: Tensor,
        params: Tensor,
        opt_state: Tensor,
        total: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        counts = counted(weights)
        new_params, new_state = descend(params, opt_state, total, counts, *rest)
        return new_params, new_state, mean_of(losses, counts), mean_of(metrics, counts)

    rest = ("lr", "momentum", "weight_decay", "mu", "anchor", "noise")
    example = {
        **{name: torch.ones_like(values["weights"]) for name in _PER_SAMPLE},
        "params": values["params"],
        "opt_state": values["opt_state"],
        "total": torch.zeros_like(values["params"]),
        **{name: values[name] for name in rest},
    }
    graph = trace(finish, example, _PER_SAMPLE)
    return to_onnx(graph, example, ("params_out", "opt_state_out", "loss", "metric"), _PER_SAMPLE)


def _split_by_sample(graph: onnx.GraphProto) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes that are the same for every sample (views of parameters, mostly), and the others."""
    known = {"", *_OUTSIDE, *(tensor.name for tensor in graph.initializer)}
    shared, own = [], []
    for node in graph.node:
        if known.issuperset(node.input):
            known.update(node.output)
            shared.append(node)
        else:
            own.append(node)
    return shared, own


def _scan(graph: onnx.GraphProto, own: Sequence[onnx.NodeProto]) -> onnx.NodeProto:
    """The loop over samples: what it takes of each is cut off along the first axis; `own` are the nodes inside."""
    used = {name for node in own for name in node.input}
    scanned = [name for name in _SCANNED if name in used]
    infos = {value.name: value for value in graph.input}
    nodes, inputs = [], [_body_value(infos["total"], _PREFIX + "total")]
    for name in scanned:
        inputs.append(_body_value(infos[name], f"{_PREFIX}{name}_row", is_row=name != "weight"))
        if name == "weight":
            nodes.append(helper.make_node("Identity", [inputs[-1].name], [_PREFIX + name]))
        else:
            nodes.append(
                helper.make_node("Unsqueeze", [inputs[-1].name, f"{_PREFIX}first_axis"], [_PREFIX + name])
            )
    nodes += [_renamed_node(node) for node in own]
    outputs = [_body_value(value, _PREFIX + value.name) for value in graph.output]
    body = helper.make_graph(nodes, "sample", inputs, outputs)
    return helper.make_node(
        "Scan",
        ["no_gradient", *(_SCANNED[name] for name in scanned)],
        ["total", "losses", "metrics"],
        body=body,
        num_scan_inputs=len(scanned),
    )


def _renamed_node(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [name if name in _OUTSIDE or not name else _PREFIX + name for name in node.input]
    copy.output[:] = [_PREFIX + name if name else "" for name in node.output]
    return copy


def _renamed_constants(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    constants = [numpy_helper.from_array(np.array([0], np.int64), f"{_PREFIX}first_axis")]
    for tensor in graph.initializer:
        copy = onnx.TensorProto()
        copy.CopyFrom(tensor)
        copy.name = _PREFIX + tensor.name
        constants.append(copy)
    return constants


def _body_value(value: onnx.ValueInfoProto, name: str, *, is_row: bool = False) -> onnx.ValueInfoProto:
    """A value of the body; a row has lost the first axis."""
    kind = value.type.tensor_type
    shape = [axis.dim_value for axis in kind.shape.dim]
    return helper.make_tensor_value_info(name, kind.elem_type, shape[1:] if is_row else shape)
