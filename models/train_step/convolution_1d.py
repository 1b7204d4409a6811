"""Dense 1D convolutions as one matrix product over all windows of a batch, channels last.

A `Conv` multiplies sample by sample; a short signal makes those products too narrow. With channels last,
windows are rows of `[N · out, K · C]`: slices copy whole channel blocks, and forward and both gradients are
one product each over the same rows. Two to three times as fast as `Conv` and `ConvTranspose` on signals of
tens of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from models.train_step.patches import Window, taps


def fits(x: Tensor, window: Window, groups: int) -> bool:
    """Whether the formulas below apply: one axis, one group, no dilation."""
    return len(window.kernel) == 1 and groups == 1 and window.dilation == (1,)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """`[N, C, L]` to `[N, O, out]`."""
    out = window.output_size(x.shape[2:])[0]
    rows, flat = _rows(x, out, window), _flat_weight(weight)
    product = rows @ flat.t() if bias is None else torch.addmm(bias, rows, flat.t())
    return product.reshape(x.shape[0], out, weight.shape[0]).transpose(1, 2)


def grad_weight(grad: Tensor, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Shaped like `weight`, `[O, C, K]`."""
    product = _grad_rows(grad).t() @ _rows(x, grad.shape[2], window)
    return product.reshape(grad.shape[1], window.kernel[0], x.shape[1]).transpose(1, 2)


def grad_input(grad: Tensor, x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """Shaped like `x`: every window's gradient added to where the window lay.

    Kernel positions are taken `stride` at a time: such a slab covers the signal without overlap, and the next
    slab is the same one row further.
    """
    channels, size, out = x.shape[1], x.shape[2], grad.shape[2]
    kernel, stride = window.kernel[0], window.stride[0]
    slabs = -(-kernel // stride)
    width = stride * channels
    flat = functional.pad(_flat_weight(weight), [0, slabs * width - kernel * channels])
    spread = (_grad_rows(grad) @ flat).reshape(grad.shape[0], out, slabs * width)
    total: Tensor | None = None
    for number, slab in enumerate(torch.split(spread, width, 2)):
        shifted = functional.pad(slab, [0, 0, number, slabs - 1 - number])
        total = shifted if total is None else total + shifted
    assert total is not None
    covered = total.reshape(grad.shape[0], (out + slabs - 1) * stride, channels)
    before = window.padding[0]
    missing = max(0, before + size - covered.shape[1])
    covered = functional.pad(covered, [0, 0, 0, missing]) if missing else covered
    return covered[:, before : before + size].transpose(1, 2)


def _rows(x: Tensor, out: int, window: Window) -> Tensor:
    """Windows as rows: `[N · out, K · C]`."""
    before, behind = window.edges(0, x.shape[2], out)
    steps = x.transpose(1, 2)
    padded = functional.pad(steps, [0, 0, before, behind]) if before or behind else steps
    met = torch.cat(taps(padded, 1, out, window, 0), 2)
    return met.reshape(-1, met.shape[2])


def _grad_rows(grad: Tensor) -> Tensor:
    return grad.transpose(1, 2).reshape(-1, grad.shape[1])


def _flat_weight(weight: Tensor) -> Tensor:
    """`[O, C, K]` to `[O, K · C]`, the order of `_rows`."""
    return weight.transpose(1, 2).reshape(weight.shape[0], -1)
