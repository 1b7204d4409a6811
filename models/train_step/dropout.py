"""Dropout whose mask is a function of (seed, step, layer, element): the same in the graph and in torch.

Exported as it is, dropout becomes `RandomUniformLike` and nothing can be compared or replayed. Here a counter
is hashed with 32-bit arithmetic on int64 values, in operators that onnxruntime has; no product exceeds 63
bits, so nothing depends on overflow. The torch side (`counter_bits`) and the ONNX side (translations.py)
give the same bits. Source of the hash: C. Wellons, "hash-prospector", a two-round function whose multipliers
are below 2**31; the counter scheme is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
(2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from wire.errors import UnsupportedLayerError

WORD = 0xFFFFFFFF
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
SHIFTS = (16, 15, 15)


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
    return _mix(_mix(counter ^ key) ^ _mix(key)).reshape(like.shape)


@counter_bits.register_fake
def _(like: Tensor, seed: Tensor, step: Tensor, layer: int) -> Tensor:
    return torch.empty_like(like, dtype=torch.int64)


def _mix(word: Tensor) -> Tensor:
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        word = word ^ (word >> shift)
        if multiplier != 1:
            word = (word * multiplier) & WORD
    return word


class CounterDropout(TorchFunctionMode):
    """While active, every dropout of a forward draws its mask from `seed` and `step`.

    Layers are numbered in the order of their calls, so one instance serves one forward.

    Args:
        seed: int64 [].
        step: int64 [].
    """

    def __init__(self, seed: Tensor, step: Tensor) -> None:
        super().__init__()
        self._seed = seed
        self._step = step
        self._layers = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ELEMENT_DROPOUTS:
            return self._drop(*args, **kwargs)
        if func in _CHANNEL_DROPOUTS:
            return self._drop_channels(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self._reopened(func)(*args, **kwargs)
        if func in _REFUSED:
            name = func.__name__
            hint = "use nn.Dropout"
            raise UnsupportedLayerError(
                f"{name} has no training graph", hint=hint, layer=name, substitute=hint
            )
        return func(*args, **kwargs)

    def _drop(
        self,
        x: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        train: bool | None = None,
    ) -> Tensor:
        return self._masked(x, x, p, training if train is None else train)

    def _drop_channels(
        self,
        x: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        train: bool | None = None,
    ) -> Tensor:
        channels = x.detach().flatten(2)[..., :1].reshape(x.shape[0], x.shape[1], *[1] * (x.dim() - 2))
        return self._masked(x, channels, p, training if train is None else train)

    def _masked(self, x: Tensor, like: Tensor, p: float, training: bool) -> Tensor:
        if not training or p == 0:
            return x
        if p >= 1:
            return x * 0.0
        bits = counter_bits(like.detach(), self._seed, self._step, self._layers)
        self._layers += 1
        keep: Tensor = (bits >= math.floor(p * 2**32)).to(x.dtype)
        return x * (keep * (1 / (1 - p)))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p == 0 or enable_gqa:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = torch.where(attn_mask, scores, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return self._masked(torch.softmax(scores, -1), scores, dropout_p, True) @ value

    def _reopened(self, func: Callable[..., Any]) -> Callable[..., Any]:
        # torch leaves the mode while it runs one of its own functions, so a dropout inside would not be seen.
        if not isinstance(func, FunctionType):
            return func
        own = {
            "has_torch_function": lambda _: False,
            "dropout": self._drop,
            "scaled_dot_product_attention": self._attention,
        }
        copy = FunctionType(func.__code__, func.__globals__ | own, func.__name__, func.__defaults__)
        copy.__kwdefaults__ = func.__kwdefaults__
        return copy


_ELEMENT_DROPOUTS = (functional.dropout, torch.dropout)
_CHANNEL_DROPOUTS = (
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    torch.feature_dropout,
)
_REFUSED = (
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.alpha_dropout,
    torch.feature_alpha_dropout,
    functional.rrelu,
    functional.gumbel_softmax,
)
