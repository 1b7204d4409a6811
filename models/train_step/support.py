"""Which layers a train step can be made of, checked before anything is traced.

A layer of `torch.nn` is judged by its exact class. A class of the user's own is not judged but walked into: its
forward is traced operator by operator, and an operator that cannot be written in ONNX is an error there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from wire.errors import UnsupportedLayerError

SUPPORTED_LAYERS: frozenset[type[nn.Module]] = frozenset(
    {
        *(nn.Linear, NonDynamicallyQuantizableLinear, nn.Identity, nn.Flatten, nn.Unflatten),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.LPPool2d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
        *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU),
        *(
            nn.Mish,
            nn.Hardswish,
            nn.Hardsigmoid,
            nn.Sigmoid,
            nn.LogSigmoid,
            nn.Tanh,
            nn.Softplus,
            nn.Softsign,
        ),
        *(nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
        *(nn.Threshold, nn.GLU, nn.Softmax, nn.Softmin, nn.Softmax2d, nn.LogSoftmax),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
        *(nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder),
        *(nn.RNN, nn.GRU, nn.LSTM),
        *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
        *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.CircularPad1d, nn.CircularPad2d),
        *(nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle),
        *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
    }
)
"""Layers of `torch.nn` that the tests export and compare with torch; any other one is refused."""

_FIXED_POOL = "nn.MaxPool2d with a fixed kernel, or x.amax((2, 3)) for one value a channel"
_FLAT_POOL = "a strided nn.Conv3d, or 2D pooling over x.flatten(1, 2)"
_STATELESS_NORM = "nn.GroupNorm, whose statistics need no other device"

SUBSTITUTES: Mapping[type[nn.Module], str] = MappingProxyType(
    {
        nn.AdaptiveMaxPool1d: _FIXED_POOL,
        nn.AdaptiveMaxPool2d: _FIXED_POOL,
        nn.FractionalMaxPool2d: _FIXED_POOL,
        nn.MaxPool3d: _FLAT_POOL,
        nn.AvgPool3d: _FLAT_POOL,
        nn.AdaptiveAvgPool3d: "x.mean((2, 3, 4)) for one value a channel",
        nn.MaxUnpool2d: "nn.ConvTranspose2d, or nn.Upsample",
        nn.SyncBatchNorm: _STATELESS_NORM,
        nn.LocalResponseNorm: _STATELESS_NORM,
        nn.Bilinear: "two nn.Linear and a product",
        nn.Embedding: "nn.Linear without bias over one-hot inputs",
        nn.EmbeddingBag: "nn.Linear without bias over counts",
        nn.RReLU: "nn.LeakyReLU",
        nn.ReplicationPad1d: "nn.ReflectionPad1d",
        nn.ReplicationPad2d: "nn.ReflectionPad2d",
        nn.Transformer: "nn.TransformerEncoder",
        nn.TransformerDecoder: "nn.TransformerEncoder",
        nn.TransformerDecoderLayer: "nn.TransformerEncoderLayer",
        nn.RNNCell: "nn.RNN",
        nn.GRUCell: "nn.GRU",
        nn.LSTMCell: "nn.LSTM",
    }
)
"""What to write instead of a layer that has no training graph."""


def check_supported(module: nn.Module) -> None:
    """Check every layer of a module.

    Raises:
        UnsupportedLayerError: names the first layer that has no training graph, and the substitute.
    """
    for name, layer in module.named_modules():
        kind = type(layer)
        if kind.__module__.startswith("torch.nn.") and kind not in SUPPORTED_LAYERS:
            raise _refusal(f"{name} ({kind.__name__})" if name else kind.__name__, SUBSTITUTES.get(kind, ""))
        momentum = getattr(layer, "momentum", 0.0)
        if (
            isinstance(layer, nn.modules.batchnorm._NormBase)
            and layer.track_running_stats
            and momentum is None
        ):
            raise _refusal(f"{name} ({kind.__name__} with momentum=None)", "a momentum, such as 0.1")


def _refusal(layer: str, substitute: str) -> UnsupportedLayerError:
    known = "use layers of models.train_step.SUPPORTED_LAYERS, or write its forward in tensor operations"
    return UnsupportedLayerError(
        f"{layer} has no training graph",
        hint=f"use {substitute}" if substitute else known,
        layer=layer,
        substitute=substitute,
    )
