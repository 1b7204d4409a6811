"""Dropout whose mask is a function of (seed, step, layer, element): the same in the graph and in torch.

Exported as it is, dropout becomes `RandomUniformLike` and nothing can be compared or replayed. Here a counter
is hashed with 32-bit arithmetic on int64 values, in operators that onnxruntime has; no product exceeds 63
bits, so nothing depends on overflow. The torch side (`counter_bits`) and the ONNX side (translations.py)
give the same bits. Source of the hash: C. Wellons, "hash-prospector", a two-round function whose multipliers
are below 2**31; the counter scheme is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
(2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

WORD = 0xFFFFFFFF
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
SHIFTS = (16, 15, 15)
SECOND_KEY = 0x9E3779B9
"""Makes another key of the first; the same twice would give element 0 the same word whatever the seed."""


@torch.library.custom_op("shoal::counter_bits", mutates_args=())
def counter_bits(like: Tensor, seed: Tensor, step: Tensor, layer: int) -> Tensor:
    """Uniform 32-bit words, one for each element of `like`.

    Args:
        like: gives the shape only.
        seed: int64 [], the run's seed.
        step: int64 [], the step within the run.
        layer: which dropout of the forward this is, from 0.

    Returns:
        int64, shaped like `like`, in [0, 2**32).
    """
    key = _mix(seed & WORD)
    key = _mix(key ^ ((seed >> 32) & WORD))
    key = _mix(key ^ (step & WORD))
    key = _mix(key ^ layer)
    counter = torch.arange(like.numel(), dtype=torch.int64)
    return _mix(_mix(counter ^ key) ^ _mix(key ^ SECOND_KEY)).reshape(like.shape)


@counter_bits.register_fake
def _(like: Tensor, seed: Tensor, step: Tensor, layer: int) -> Tensor:
    return torch.empty_like(like, dtype=torch.int64)


def _mix(word: Tensor) -> Tensor:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        word = word ^ (word >> shift)
        if multiplier != 1:
            word = (word * multiplier) & WORD
    return word


class CounterDropout(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, everything that drops values draws its mask from `seed` and `step`.

    It works below autograd and torch's composite layers, so attention's and channel dropout are seen too.
    Draws are numbered in the order of the forward, so one instance serves one forward.

    Args:
        seed: int64 [].
        step: int64 [].
    """

    def __init__(self, seed: Tensor, step: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._step = step
        self._layers = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is aten.native_dropout.default:
            return self._native_dropout(*args)
        if func is aten.bernoulli_.float:
            return args[0].copy_(self._keep(args[0], 1 - _probability(*args, **(kwargs or {}))))
        if func is aten.bernoulli.p:
            return self._keep(args[0], 1 - _probability(*args, **(kwargs or {}))).to(args[0].dtype)
        return func(*args, **(kwargs or {}))

    def _native_dropout(self, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
        if train is False or p == 0:
            return x.clone(), torch.ones_like(x, dtype=torch.bool)
        keep = self._keep(x, p)
        scale = 0.0 if p == 1 else 1 / (1 - p)
        return x * keep.to(x.dtype) * scale, keep

    def _keep(self, like: Tensor, drop_probability: float) -> Tensor:
        bits = counter_bits(like, self._seed, self._step, self._layers)
        self._layers += 1
        keep: Tensor = bits >= round(drop_probability * (WORD + 1))
        return keep


def _probability(_: Tensor, p: float = 0.5, generator: object = None) -> float:
    return p


def native_dropout_backward(grad: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Replacement of `aten.native_dropout_backward`."""
    return grad * mask.to(grad.dtype) * scale
