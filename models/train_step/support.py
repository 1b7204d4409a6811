"""Which layers a train step can be made of, checked before anything is traced.

A layer of `torch.nn` is judged by its exact class; a class of the user's own is not judged but walked into,
because its forward is traced operator by operator and what cannot be written in ONNX is an error there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from wire.errors import UnsupportedLayerError

SUPPORTED_LAYERS: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Linear,
        nn.Bilinear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.MaxPool1d,
        nn.MaxPool2d,
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        nn.ReLU,
        nn.ReLU6,
        nn.Hardtanh,
        nn.LeakyReLU,
        nn.ELU,
        nn.GELU,
        nn.SiLU,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.Sigmoid,
        nn.Tanh,
        nn.Softplus,
        nn.Softmax,
        nn.LogSoftmax,
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.MultiheadAttention,
        nn.TransformerEncoderLayer,
        nn.TransformerEncoder,
        nn.Flatten,
        nn.Unflatten,
        nn.Identity,
        nn.ZeroPad1d,
        nn.ZeroPad2d,
        nn.ZeroPad3d,
        nn.ConstantPad1d,
        nn.ConstantPad2d,
        nn.Sequential,
        nn.ModuleList,
        nn.ModuleDict,
        nn.ParameterList,
        nn.ParameterDict,
    }
)
"""Layers that the tests train and compare with torch; anything of `torch.nn` that is not here is refused."""

SUBSTITUTES: Mapping[type[nn.Module], str] = MappingProxyType({})


def check_supported(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        kind = type(layer)
        if not kind.__module__.startswith("torch.nn.") or kind in SUPPORTED_LAYERS:
            continue
        substitute = SUBSTITUTES.get(kind, "")
        raise UnsupportedLayerError(f"{name}: {kind.__name__}", layer=name, substitute=substitute, hint="")
