"""The inputs that each kernel position of a convolution meets (im2col), in slices that are copied row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Window:
    """How a kernel moves over a signal, one value for each spatial axis."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Self:
        """From the arguments of `aten.convolution`, where one value may stand for all axes."""
        rank = x.dim() - 2
        per_axis = [v if len(v) == rank else [v[0]] * rank for v in (stride, padding, dilation)]
        return cls(tuple(weight.shape[2:]), *(tuple(values) for values in per_axis))

    @property
    def is_pointwise(self) -> bool:
        """Each output sees one input: a matrix product over channels."""
        return all(v == 1 for v in (*self.kernel, *self.stride)) and not any(self.padding)

    def output_size(self, sizes: Sequence[int]) -> list[int]:
        """Spatial sizes of the output for an input of `sizes`."""
        axes = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes]

    def left_over(self, sizes: Sequence[int], out_sizes: Sequence[int]) -> list[int]:
        """Inputs behind the last window: the output padding of the convolution back."""
        axes = zip(sizes, out_sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [size - ((out - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, k, s, p, d in axes]

    def edges(self, axis: int, size: int, out: int) -> tuple[int, int]:
        """Padding before and behind one axis, so that every window of `out` lies inside."""
        before = self.padding[axis]
        reach = (out - 1) * self.stride[axis] + self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return before, max(before, reach - size - before)


def columns(x: Tensor, out_sizes: Sequence[int], window: Window) -> Tensor:
    """The inputs of every window.

    One axis after the other, because a kernel of k × k then takes 2k copies instead of k².

    Args:
        x: `[N, C, *sizes]`.
        out_sizes: spatial sizes of the output.
        window: how the kernel moves.

    Returns:
        `[N, *kernel · C, *out_sizes]`, the kernel positions outermost in the channel axis.
    """
    rank = len(window.kernel)
    edges = [window.edges(axis, x.shape[2 + axis], out_sizes[axis]) for axis in reversed(range(rank))]
    flat_edges = [edge for pair in edges for edge in pair]
    found = functional.pad(x, flat_edges) if any(flat_edges) else x
    for axis in reversed(range(rank)):
        found = torch.cat(taps(found, 2 + axis, out_sizes[axis], window, axis), 1)
    return found


def taps(padded: Tensor, dim: int, out: int, window: Window, axis: int) -> list[Tensor]:
    """For each kernel position along one axis, the `out` inputs that it meets."""
    stride, dilation = window.stride[axis], window.dilation[axis]
    ends = (out - 1) * stride + 1
    starts = [position * dilation for position in range(window.kernel[axis])]
    return [aten.slice(padded, dim, start, start + ends, stride) for start in starts]
