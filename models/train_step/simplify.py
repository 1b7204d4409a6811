"""Rewrites of a traced step that keep its values and save a device time.

onnxruntime computes a shape at run time wherever a batch size is symbolic, and copies where torch would only
look at memory in another way; so sizes are inferred, broadcasts are left to the operators that broadcast
anyway, and what forward and backward both need is computed once.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Operators that act value by value on their first argument, so that they may come before a broadcast.
_UNARY = frozenset({aten.div.Scalar, aten.mul.Scalar, aten.add.Scalar, aten.sub.Scalar, aten.neg.default})
_BINARY = frozenset({aten.div.Tensor, aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor})


def simplify(graph: fx.GraphModule) -> None:
    """Rewrite a functional graph of ATen operators in place."""
    _share_equal_nodes(graph.graph)
    _delay_broadcasts(graph.graph)
    _infer_symbolic_sizes(graph.graph)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def constant_size(size: int | torch.SymInt) -> int | None:
    """The size as a number, None while it is symbolic."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _share_equal_nodes(graph: fx.Graph) -> None:
    known: dict[Hashable, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        if key in known:
            node.replace_all_uses_with(known[key])
        else:
            known[key] = node


def _frozen(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    # 1, 1.0 and True are equal to Python and not to an operator.
    return (type(value), value)


def _delay_broadcasts(graph: fx.Graph) -> None:
    """An `expand` moves behind operators on single values, and goes where the other operand has the full shape."""
    for node in graph.nodes:
        if node.target is not aten.expand.default:
            continue
        source = node.args[0]
        for user in list(node.users):
            if user.target in _BINARY and _has_full_operand(user, node):
                user.replace_input_with(node, source)
            elif user.target in _UNARY and user.args[0] is node:
                with graph.inserting_before(user):
                    early = graph.call_function(user.target, (source, *user.args[1:]), user.kwargs)
                    early.meta["val"] = source.meta["val"]
                user.target, user.args, user.kwargs = node.target, (early, *node.args[1:]), node.kwargs


def _has_full_operand(user: fx.Node, broadcast: fx.Node) -> bool:
    others = [value for value in user.args[:2] if value is not broadcast]
    return len(others) == 1 and isinstance(others[0], fx.Node) and _shape(others[0]) == _shape(user)


def _shape(node: fx.Node) -> list[int | str]:
    return [str(size) if constant_size(size) is None else int(size) for size in node.meta["val"].shape]


def _infer_symbolic_sizes(graph: fx.Graph) -> None:
    """Say -1 where a view has one symbolic size: the graph then need not compute shapes.

    Views become reshapes, because ONNX has no strides that a rewrite would have to keep.
    """
    for node in graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default
            sizes = [constant_size(size) for size in node.meta["val"].shape]
            if sizes.count(None) == 1:
                node.args = (node.args[0], [-1 if size is None else size for size in sizes])
