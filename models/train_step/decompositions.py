"""The table of decompositions that the trace uses: core ATen's, and ours where ONNX lacks one or is slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions

from models.train_step import activations, convolution, dropout, normalization, pooling

aten = torch.ops.aten

Table = dict[Any, Callable[..., Any]]

_FROM_TORCH = (
    aten.gelu_backward,
    aten._log_softmax_backward_data,
    aten._softmax_backward_data,
    aten.sigmoid_backward,
    aten.tanh_backward,
    aten.hardsigmoid_backward,
    aten.hardswish_backward,
    aten.elu_backward,
    aten.leaky_relu_backward,
    aten.softplus_backward,
    aten.select_backward,
    aten.slice_backward,
    aten.embedding_dense_backward,
    aten.detach,
    aten.t,
    aten.transpose.int,
)


def decomposition_table() -> Table:
    """Decompositions by operator, for `make_fx`."""
    table: Table = dict(core_aten_decompositions())
    table.update(get_decompositions(_FROM_TORCH))
    table.update(
        {
            aten.convolution.default: convolution.convolution,
            aten.convolution_backward.default: convolution.convolution_backward,
            aten.max_pool2d_with_indices.default: pooling.max_pool2d_with_indices,
            aten.max_pool2d_with_indices_backward.default: pooling.max_pool2d_with_indices_backward,
            aten._adaptive_avg_pool2d_backward.default: pooling.adaptive_avg_pool2d_backward,
            aten.avg_pool2d_backward.default: pooling.avg_pool2d_backward,
            aten._native_batch_norm_legit.no_stats: normalization.batch_norm,
            aten._native_batch_norm_legit_functional.default: normalization.batch_norm_functional,
            aten.native_batch_norm_backward.default: normalization.native_batch_norm_backward,
            aten.native_group_norm.default: normalization.native_group_norm,
            aten.native_group_norm_backward.default: normalization.native_group_norm_backward,
            aten.native_layer_norm.default: normalization.native_layer_norm,
            aten.native_layer_norm_backward.default: normalization.native_layer_norm_backward,
            aten.native_dropout_backward.default: dropout.native_dropout_backward,
            aten.threshold_backward.default: activations.threshold_backward,
            aten.hardtanh_backward.default: activations.hardtanh_backward,
            aten.silu_backward.default: activations.silu_backward,
            aten.empty_permuted.default: _empty,
        }
    )
    return table


def _empty(
    size: Sequence[int], _: Sequence[int], *, dtype: torch.dtype | None = None, **_kwargs: Any
) -> Tensor:
    """ONNX has no memory without values; what is allocated this way is overwritten in place."""
    return torch.zeros(size, dtype=dtype)
