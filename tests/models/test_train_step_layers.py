"""Every layer that a train step may be made of is compared with torch; every other one is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from models import ort
from models.flat import flatten_buffers, flatten_params
from models.task import Task
from models.train_step import SUPPORTED_LAYERS, check_supported, export_train_step
from models.train_step.reference import Batch, EagerStep, Hyper, State
from wire.errors import UnsupportedLayerError

TASK = Task.classification(3)
LINE, IMAGE, VOLUME = (4, 12), (4, 6, 8), (2, 4, 4, 6)
CONTAINERS = {nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict}


class Net(nn.Module):
    """One layer between two linear ones, so that its input has a gradient and its output a nonlinear use."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Linear(shape[-1], shape[-1])
        self.layer = layer
        size = torch.zeros(2, *shape)
        self.last = nn.Linear(self._middle(size).shape[1], TASK.classes)

    def _middle(self, x: Tensor) -> Tensor:
        outputs = self.layer(self.first(x))
        return torch.tanh(outputs[0] if isinstance(outputs, tuple) else outputs).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self._middle(x))


class SelfAttention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, **options)


Make = Callable[[], nn.Module]
LAYERS: list[tuple[tuple[int, ...], Make]] = [
    (LINE, nn.Identity),
    (IMAGE, nn.Flatten),
    (LINE, lambda: nn.Unflatten(1, (2, 2))),
    (IMAGE, lambda: nn.Conv2d(4, 6, 3)),
    (IMAGE, lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2)),
    (IMAGE, lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1)),
    (IMAGE, lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, stride=2)),
    (IMAGE, lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1)),
    ((3, 16, 16), lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1)),
    (IMAGE, lambda: nn.Conv2d(4, 6, 1)),
    (IMAGE, lambda: nn.Conv2d(4, 6, 1, stride=2, bias=False)),
    (IMAGE, lambda: nn.Conv2d(4, 6, 2, padding="same", padding_mode="circular")),
    (LINE, lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2)),
    (LINE, lambda: nn.Conv1d(4, 6, 5, stride=3, padding=1, bias=False)),
    (LINE, lambda: nn.Conv1d(4, 6, 2, stride=5)),
    (LINE, lambda: nn.Conv1d(4, 6, 3, dilation=2)),
    (LINE, lambda: nn.Conv1d(4, 8, 3, groups=4, padding=1)),
    (LINE, lambda: nn.Conv1d(4, 4, 3, groups=2, stride=2)),
    (VOLUME, lambda: nn.Conv3d(2, 4, 3, padding=1, stride=2)),
    (LINE, lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1)),
    (IMAGE, lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1)),
    (IMAGE, lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2)),
    (IMAGE, lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, stride=2)),
    (VOLUME, lambda: nn.ConvTranspose3d(2, 3, 2, stride=2)),
    (LINE, lambda: nn.MaxPool1d(2)),
    (LINE, lambda: nn.MaxPool1d(3, 2, 1)),
    (IMAGE, lambda: nn.MaxPool2d(2)),
    (IMAGE, lambda: nn.MaxPool2d(3, 2, 1)),
    (IMAGE, lambda: nn.MaxPool2d(3, 2, ceil_mode=True)),
    (IMAGE, lambda: nn.MaxPool2d(2, 1, dilation=2)),
    (LINE, lambda: nn.AvgPool1d(3)),
    (IMAGE, lambda: nn.AvgPool2d(3, 2, 1)),
    (IMAGE, lambda: nn.LPPool2d(2, 2)),
    (LINE, lambda: nn.AdaptiveAvgPool1d(5)),
    (IMAGE, lambda: nn.AdaptiveAvgPool2d((4, 3))),
    (LINE, lambda: nn.BatchNorm1d(4)),
    (IMAGE, lambda: nn.BatchNorm2d(4, affine=False)),
    (VOLUME, lambda: nn.BatchNorm3d(2, track_running_stats=False)),
    (LINE, lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
    (IMAGE, lambda: nn.InstanceNorm2d(4)),
    (VOLUME, lambda: nn.InstanceNorm3d(2)),
    (IMAGE, lambda: nn.GroupNorm(2, 4)),
    (LINE, lambda: nn.GroupNorm(2, 4, affine=False)),
    (IMAGE, lambda: nn.LayerNorm([6, 8])),
    (LINE, lambda: nn.LayerNorm(12, elementwise_affine=False)),
    (LINE, lambda: nn.RMSNorm(12)),
    (LINE, nn.ReLU),
    (LINE, lambda: nn.ReLU(inplace=True)),
    (LINE, nn.ReLU6),
    (LINE, lambda: nn.Hardtanh(-0.3, 0.7)),
    (LINE, nn.LeakyReLU),
    (LINE, nn.PReLU),
    (LINE, nn.ELU),
    (LINE, nn.CELU),
    (LINE, nn.SELU),
    (LINE, nn.GELU),
    (LINE, lambda: nn.GELU("tanh")),
    (LINE, nn.SiLU),
    (LINE, nn.Mish),
    (LINE, nn.Hardswish),
    (LINE, nn.Hardsigmoid),
    (LINE, nn.Sigmoid),
    (LINE, nn.LogSigmoid),
    (LINE, nn.Tanh),
    (LINE, nn.Softplus),
    (LINE, nn.Softsign),
    (LINE, nn.Softshrink),
    (LINE, nn.Hardshrink),
    (LINE, nn.Tanhshrink),
    (LINE, lambda: nn.Threshold(0.1, 0.7)),
    (LINE, lambda: nn.GLU(1)),
    (LINE, lambda: nn.Softmax(-1)),
    (LINE, lambda: nn.Softmin(-1)),
    (IMAGE, nn.Softmax2d),
    (LINE, lambda: nn.LogSoftmax(-1)),
    (LINE, lambda: nn.Dropout(0.3)),
    (LINE, lambda: nn.Dropout1d(0.3)),
    (IMAGE, lambda: nn.Dropout2d(0.3)),
    (VOLUME, lambda: nn.Dropout3d(0.3)),
    (LINE, lambda: nn.AlphaDropout(0.3)),
    (LINE, lambda: nn.FeatureAlphaDropout(0.3)),
    (LINE, lambda: SelfAttention(0.0)),
    (LINE, lambda: SelfAttention(0.2)),
    (LINE, encoder_layer),
    (LINE, lambda: encoder_layer(norm_first=True, activation="gelu")),
    (LINE, lambda: nn.TransformerEncoder(encoder_layer(), 1, enable_nested_tensor=False)),
    (LINE, lambda: nn.RNN(12, 6, batch_first=True)),
    (LINE, lambda: nn.GRU(12, 6, batch_first=True)),
    (LINE, lambda: nn.LSTM(12, 6, batch_first=True)),
    (LINE, lambda: nn.ZeroPad1d(1)),
    (IMAGE, lambda: nn.ZeroPad2d(1)),
    (VOLUME, lambda: nn.ZeroPad3d(1)),
    (LINE, lambda: nn.ConstantPad1d(2, 0.5)),
    (IMAGE, lambda: nn.ConstantPad2d(1, 0.5)),
    (VOLUME, lambda: nn.ConstantPad3d(1, 0.5)),
    (LINE, lambda: nn.ReflectionPad1d(1)),
    (IMAGE, lambda: nn.ReflectionPad2d(1)),
    (LINE, lambda: nn.CircularPad1d(1)),
    (IMAGE, lambda: nn.CircularPad2d(1)),
    (IMAGE, lambda: nn.Upsample(scale_factor=2)),
    (IMAGE, lambda: nn.PixelShuffle(2)),
    (IMAGE, lambda: nn.PixelUnshuffle(2)),
]


class ManyLayers(nn.Module):
    """One of each hard kind, so that the quick tests meet them too."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU6(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6),
            nn.GroupNorm(3, 6),
            nn.SiLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.ConvTranspose2d(6, 4, 2, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
        )
        self.line = nn.Conv1d(4, 5, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, TASK.classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.line(self.front(x).flatten(2)).transpose(1, 2))
        return self.last(nn.functional.gelu(tokens).mean(1))


def make_id(case: tuple[tuple[int, ...], Make]) -> str:
    return repr(case[1]()).replace("\n", " ")[:70]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "make"), LAYERS, ids=[make_id(case) for case in LAYERS])
def test_layer_trains_as_in_torch(shape: tuple[int, ...], make: Make) -> None:
    torch.manual_seed(0)
    export_train_step(Net(make(), shape), TASK, shape)


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_net_of_many_layers_trains_as_in_torch(optimizer: str) -> None:
    torch.manual_seed(0)
    export = export_train_step(ManyLayers(), TASK, (2, 16, 16), optimizer)
    assert "seed" in export.inputs
    assert export.buffers_size == 12


def test_every_supported_layer_has_a_case() -> None:
    met = {type(part) for _, make in LAYERS for part in make().modules()} | {nn.Linear} | CONTAINERS
    assert met >= SUPPORTED_LAYERS
    assert NonDynamicallyQuantizableLinear in met


def test_max_pool_breaks_ties_as_torch_does() -> None:
    """Flat image regions give equal values in a window: torch sends the gradient to the first of them."""
    torch.manual_seed(0)
    apart, overlapping = nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)
    module = nn.Sequential(nn.Conv2d(1, 3, 1), apart, overlapping, nn.Flatten(), nn.Linear(27, TASK.classes))
    export = export_train_step(module, TASK, (1, 12, 12))
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 2, (4, 1, 12, 12)).astype(np.float32), rng.integers(0, 3, 4)
    batch = Batch(x, y, np.ones(4, np.float32), noise=np.zeros(export.params_size, np.float32))
    state = State(flatten_params(module), np.zeros(export.params_size, np.float32), flatten_buffers(module))
    hyper = Hyper(lr=0.1, momentum=0.9, weight_decay=0.0, mu=0.0)
    after, _, _ = EagerStep(module, TASK, "sgd").run(state, batch, hyper, state.params, 0, 0)
    feeds = {
        "params": state.params,
        "opt_state": state.opt_state,
        "x": batch.x,
        "y": batch.y,
        "weights": batch.weights[None],
        "index": np.arange(4)[None],
        "lr": np.array(hyper.lr, np.float32),
        "momentum": np.array(hyper.momentum, np.float32),
        "weight_decay": np.array(0, np.float32),
        "mu": np.array(0, np.float32),
        "anchor": state.params,
    }
    outputs = ort.run(ort.make_session(export.model), feeds)
    np.testing.assert_allclose(outputs["opt_state_out"], after.opt_state, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "substitute"),
    [
        (nn.AdaptiveMaxPool2d(2), "nn.MaxPool2d"),
        (nn.RReLU(), "nn.LeakyReLU"),
        (nn.Embedding(4, 2), "one-hot"),
        (nn.BatchNorm1d(3, momentum=None), "momentum"),
        (nn.CosineSimilarity(), ""),
    ],
)
def test_unsupported_layer_is_named_with_its_substitute(layer: nn.Module, substitute: str) -> None:
    module = nn.ModuleDict({"head": nn.Sequential(nn.Linear(2, 2), layer)})
    with pytest.raises(UnsupportedLayerError) as caught:
        check_supported(module)
    assert "head.1" in str(caught.value)
    assert type(layer).__name__ in caught.value.facts["layer"]
    assert substitute in caught.value.facts["substitute"]
    assert caught.value.hint


class Functional(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, TASK.classes)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


@pytest.mark.parametrize(
    ("act", "operator"),
    [(lambda x: x + torch.rand_like(x), "rand"), (lambda x: torch.erfinv(torch.tanh(x)), "erf_inv")],
    ids=["random", "erfinv"],
)
def test_unsupported_operator_of_a_forward_is_named(act: Callable[[Tensor], Tensor], operator: str) -> None:
    with pytest.raises(UnsupportedLayerError) as caught:
        export_train_step(Functional(act), TASK, (4,))
    assert operator in str(caught.value)
    assert caught.value.hint
