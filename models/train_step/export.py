"""From a torch module to its train step graph: check, trace, translate, wrap, verify."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import onnx
import torch
from torch import nn

from models.flat import buffer_slots, param_slots, total_size
from models.task import Task
from models.train_step.loop import wrap_in_loop
from models.train_step.onnx_export import step_to_onnx
from models.train_step.optimizers import Optimizer, optimizer_named
from models.train_step.sample_loop import private_step_to_onnx
from models.train_step.sample_privacy import SamplePrivacy, build_private_step, check_separable, is_dense
from models.train_step.step import build_step
from models.train_step.support import check_supported
from models.train_step.trace import example_inputs, trace_step
from models.train_step.train_step_export import TrainStepExport
from models.train_step.verify import verify_train_step
from wire.errors import ModelError


def export_train_step(
    module: nn.Module,
    task: Task,
    input_shape: Sequence[int],
    optimizer: str = "sgd",
    privacy: SamplePrivacy | None = None,
) -> TrainStepExport:
    """Turn a module into one ONNX graph that trains it, and compare that graph with torch.

    Args:
        module: the model, float32; it is copied and left as it is.
        task: what it is trained for.
        input_shape: shape of one sample, without the batch.
        optimizer: "sgd" (with momentum) or "adam".
        privacy: each step is one of DP-SGD; None for the usual mean gradient.

    Returns:
        The graph and the layout of its vectors.

    Raises:
        UnsupportedLayerError: a layer has no training graph; names it and the substitute.
        ModelError: the module does not fit the task, has nothing to train, or its graph differs from torch.
        ConfigurationError: an unknown optimizer.
    """
    chosen = optimizer_named(optimizer)
    own = copy.deepcopy(module).cpu().train()
    check_supported(own)
    if privacy is not None:
        check_separable(own)
    slots, statistics = param_slots(own), buffer_slots(own)
    if not slots:
        raise ModelError(
            "the module has no trainable parameters", hint="set requires_grad on what should learn"
        )
    _check_answer(own, task, input_shape)
    params_size, buffers_size = total_size(slots), total_size(statistics)
    sizes = (params_size, chosen.state_size(params_size), buffers_size)
    one_step = _step_graph(own, task, chosen, privacy, example_inputs(*sizes, input_shape))
    model = wrap_in_loop(one_step, sizes, input_shape)
    export = TrainStepExport(
        model=model.SerializeToString(deterministic=True),
        optimizer=optimizer,
        input_shape=tuple(input_shape),
        params_size=params_size,
        opt_state_size=sizes[1],
        buffers_size=buffers_size,
        param_slots=slots,
        buffer_slots=statistics,
        inputs=tuple(value.name for value in model.graph.input),
    )
    verify_train_step(export, own, task, privacy=privacy)
    return export


def _step_graph(
    module: nn.Module,
    task: Task,
    optimizer: Optimizer,
    privacy: SamplePrivacy | None,
    example: Sequence[torch.Tensor],
) -> onnx.ModelProto:
    if privacy is not None and not is_dense(module):
        return private_step_to_onnx(module, task, optimizer, privacy, example)
    step = (
        build_step(module, task, optimizer)
        if privacy is None
        else build_private_step(module, task, optimizer, privacy)
    )
    return step_to_onnx(trace_step(step, example), example)


def _check_answer(module: nn.Module, task: Task, input_shape: Sequence[int]) -> None:
    x = torch.zeros(2, *input_shape)
    try:
        with torch.no_grad():
            outputs = copy.deepcopy(module)(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"the module does not take an input of shape {tuple(x.shape)}: {error}",
            hint="input_shape is that of one sample, without the batch",
            shape=tuple(x.shape),
        ) from error
    if not isinstance(outputs, torch.Tensor):
        raise ModelError(f"the module answers a {type(outputs).__name__}, not one tensor")
    task.check_outputs(outputs, x)
