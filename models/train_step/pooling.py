"""Max-pooling with its indices, and the backward of max- and average-pooling, in operators that ONNX has.

`MaxUnpool` sends each gradient back to where its maximum came from when windows do not overlap; overlapping
windows may share a maximum, so there the gradients are added by `ScatterElements`. Two operators of our own
carry ONNX's meaning of `Indices` (positions in the whole flattened input) from forward to backward through
the trace.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wire.errors import UnsupportedLayerError

aten = torch.ops.aten


@torch.library.custom_op("shoal::max_pool", mutates_args=())
def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> tuple[Tensor, Tensor]:
    """ONNX `MaxPool`: maxima `[N, C, OH, OW]` of `[N, C, H, W]` and their positions in the flattened `x`."""
    values, local = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)
    area = x.shape[2] * x.shape[3]
    planes = torch.arange(x.shape[0] * x.shape[1], dtype=torch.int64).reshape(x.shape[0], x.shape[1], 1, 1)
    return values, local + planes * area


@max_pool.register_fake
def _(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil: bool,
) -> tuple[Tensor, Tensor]:
    values, indices = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)
    return torch.empty_like(values), torch.empty_like(indices)


@torch.library.custom_op("shoal::max_unpool", mutates_args=())
def max_unpool(
    grad: Tensor, indices: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], overlapping: bool
) -> Tensor:
    """Adds each of `grad` to the position that `indices` names; shaped like `x`, zero elsewhere."""
    flat = torch.zeros(x.numel(), dtype=grad.dtype).scatter_add(0, indices.reshape(-1), grad.reshape(-1))
    return flat.reshape(x.shape)


@max_unpool.register_fake
def _(
    grad: Tensor, indices: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], overlapping: bool
) -> Tensor:
    return torch.empty_like(x)


def max_pool2d_with_indices(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Replacement of `aten.max_pool2d_with_indices`; the indices are ONNX's, for the backward below."""
    kernel = _pair(kernel_size)
    values, indices = max_pool(x, kernel, _pair(stride or kernel), _pair(padding), _pair(dilation), ceil_mode)
    return values, indices


def max_pool2d_with_indices_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Replacement of `aten.max_pool2d_with_indices_backward`."""
    kernel = _pair(kernel_size)
    steps = _pair(stride or kernel)
    plain = not any(padding) and not ceil_mode and all(d == 1 for d in dilation)
    overlapping = not (plain and all(k <= s for k, s in zip(kernel, steps, strict=True)))
    result: Tensor = max_unpool(grad, indices, x, kernel, steps, overlapping)
    return result


def avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Replacement of `aten.avg_pool2d_backward`: each gradient spread evenly over its window.

    Raises:
        UnsupportedLayerError: windows of unequal counts (`ceil_mode`, or padding that is not counted).
    """
    kernel = _pair(kernel_size)
    steps, edges = _pair(stride or kernel), _pair(padding)
    if ceil_mode or (any(edges) and not count_include_pad):
        hint = "use ceil_mode=False and count_include_pad=True, or pad with F.pad before"
        raise UnsupportedLayerError(
            "average pooling with unequal windows has no training graph",
            hint=hint,
            layer="AvgPool",
            substitute=hint,
        )
    count = divisor_override or kernel[0] * kernel[1]
    planes = grad.reshape(-1, 1, *grad.shape[2:])
    window = torch.full((1, 1, *kernel), 1.0 / count)
    rest = [
        i - ((o - 1) * s - 2 * p + k)
        for i, o, s, p, k in zip(x.shape[2:], grad.shape[2:], steps, edges, kernel, strict=True)
    ]
    spread: Tensor = aten.convolution(planes, window, None, steps, edges, [1, 1], True, rest, 1)
    return spread.reshape(x.shape)


def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Replacement of `aten._adaptive_avg_pool2d_backward`: averaging is linear along each axis, a constant matrix."""
    rows = _averaging(x.shape[2], grad.shape[2])
    columns = _averaging(x.shape[3], grad.shape[3])
    return rows.t() @ grad @ columns


def _averaging(size: int, out: int) -> Tensor:
    """From `size` values to `out` averages, `[out, size]`, with torch's overlapping bins."""
    bins = [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
    return torch.tensor(
        [[1 / (end - start) if start <= at < end else 0.0 for at in range(size)] for start, end in bins]
    )


def _pair(values: Sequence[int]) -> list[int]:
    return [values[0], values[-1]]
