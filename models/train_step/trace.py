"""Tracing a step into one graph of ATen operators whose batch size is a symbol.

The forward, its backward and the optimizer are traced together on fake tensors: nothing is computed, and only
the first axis of `x`, `y` and `weights` is symbolic. A forward that pins the batch size, or draws random
numbers in a way that no seed drives, is an error here and not a surprise on a device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.train_step.decompositions import decomposition_table
from models.train_step.simplify import constant_size, simplify
from models.train_step.step import PER_SAMPLE_INPUTS, STEP_INPUTS, Step
from wire.errors import ModelError, UnsupportedLayerError

EXAMPLE_BATCH = 6


def example_inputs(
    params: int, opt_state: int, buffers: int, input_shape: Sequence[int], batch: int = EXAMPLE_BATCH
) -> tuple[Tensor, ...]:
    """Inputs of the right shapes and types, in the order of `STEP_INPUTS`."""
    scalar = torch.zeros(())
    return (
        torch.zeros(params),
        torch.zeros(opt_state),
        torch.zeros(buffers),
        torch.zeros(batch, *input_shape),
        torch.zeros(batch, dtype=torch.int64),
        torch.ones(batch),
        *[scalar.clone() for _ in range(4)],
        torch.zeros(params),
        torch.zeros((), dtype=torch.int64),
        torch.zeros((), dtype=torch.int64),
        torch.zeros(params),
    )


def trace_step(step: Step, example: Sequence[Tensor]) -> fx.GraphModule:
    """Trace a step with a symbolic batch.

    Args:
        step: from `build_step`.
        example: from `example_inputs`.

    Returns:
        A graph of core ATen operators and ours, functional, without dead code.

    Raises:
        ModelError: the forward depends on values, or pins the batch size.
        UnsupportedLayerError: it draws random numbers that no seed drives.
    """
    return trace(step, dict(zip(STEP_INPUTS, example, strict=True)), PER_SAMPLE_INPUTS)


def trace(
    function: Callable[..., tuple[Tensor, ...]], example: Mapping[str, Tensor], per_sample: Sequence[str]
) -> fx.GraphModule:
    """Trace a function of tensors.

    Args:
        example: its arguments by name, in its order.
        per_sample: those whose first axis is a symbol, which is checked; the others keep their shapes.

    Raises:
        ModelError, UnsupportedLayerError: as `trace_step`.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = [_fake(mode, value, is_symbolic=name in per_sample) for name, value in example.items()]
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            # Twice, because functionalize, like all of torch.func, loses symbolic sizes in composite
            # operators.
            joint = _tolerate_strides(make_fx(function, tracing_mode="symbolic")(*fakes))
            graph = make_fx(
                functionalize(joint, remove="mutations"),
                tracing_mode="symbolic",
                decomposition_table=decomposition_table(),
            )(*fakes)
    except GuardOnDataDependentSymNode as error:
        raise ModelError(
            "the forward depends on the values of its input",
            hint="no .item(), no `if` over a tensor in forward",
        ) from error
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"the forward cannot be traced: {reason}",
            hint="write it in torch operators on its input and parameters, without Python side effects",
        ) from error
    simplify(graph)
    for place, name in enumerate(example):
        if name in per_sample:
            _check_batch_is_symbolic(graph, place)
    _check_deterministic(graph)
    return graph


def _fake(mode: FakeTensorMode, value: Tensor, *, is_symbolic: bool) -> Tensor:
    sizes = [DimDynamic.STATIC] * value.dim()
    if is_symbolic:
        sizes[0] = DimDynamic.DYNAMIC
    fake: Tensor = mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    return fake


def _tolerate_strides(graph: fx.GraphModule) -> fx.GraphModule:
    """Views become reshapes: our decompositions give the values of the operators they replace, not their strides."""
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    return graph


def _check_batch_is_symbolic(graph: fx.GraphModule, place: int) -> None:
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    batch = constant_size(placeholders[place].meta["val"].shape[0])
    if batch is not None:
        raise ModelError(
            f"the forward works for a batch of {batch} only",
            hint="take sizes from x.shape, not from a constant, in every reshape of forward",
        )


def _check_deterministic(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            hint = "use nn.Dropout, whose mask the train step draws from its seed"
            raise UnsupportedLayerError(
                f"the forward draws random numbers by {node.target}",
                hint=hint,
                layer=str(node.target),
                substitute=hint,
            )
