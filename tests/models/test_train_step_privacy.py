"""DP-SGD as an exported graph: what torch computes sample by sample, no sample above its bound, the noise given."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import ort
from models.flat import flatten_params
from models.task import Task
from models.train_step import SamplePrivacy, TrainStepExport, export_train_step, verify_train_step
from models.zoo import load
from wire.errors import ConfigurationError, ModelError, UnsupportedLayerError

TASK = Task.classification(3)
CLIP = 0.05
PRIVACY = SamplePrivacy(CLIP, 2.0)


class Gestures(nn.Module):
    """A convolution, a norm within each sample and a parameter of its own: what cannot be taken all samples at once."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv1d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.offset = nn.Parameter(0.1 * torch.randn(8, 1))
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.silu(self.norm(self.filter(x.reshape(-1, 2, 3))) + self.offset)
        answer: Tensor = self.classifier(hidden.mean(2))
        return answer


@pytest.fixture(scope="module", params=["dense", "convolutional"])
def module(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "dense":
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return Gestures()


@pytest.fixture(scope="module")
def export(module: nn.Module) -> TrainStepExport:
    return export_train_step(module, TASK, (6,), "sgd", PRIVACY)


def run(
    export: TrainStepExport,
    module: nn.Module,
    x: npt.NDArray[Any],
    *,
    noise: float = 0.0,
    weights: Any = None,
    labels: Any = None,
) -> npt.NDArray[Any]:
    """How one step with a learning rate of 1 moves the parameters; `noise` is that of every parameter."""
    params = flatten_params(module)
    drawn = np.random.default_rng(0).integers(0, 3, len(x))
    feeds = {
        "params": params,
        "opt_state": np.zeros(export.opt_state_size, np.float32),
        "x": x,
        "y": drawn if labels is None else labels,
        "weights": (np.ones(len(x)) if weights is None else np.asarray(weights)).astype(np.float32)[None],
        "index": np.arange(len(x))[None],
        **dict.fromkeys(("momentum", "weight_decay", "mu"), np.array(0, np.float32)),
        "lr": np.array(1, np.float32),
        "anchor": params,
        "noise": np.full((1, params.size), noise, np.float32),
    }
    session = ort.make_session(export.model)
    known = {name: value for name, value in feeds.items() if name in export.inputs}
    return ort.run(session, known)["params_out"] - params


def samples(count: int, scale: float = 1.0) -> npt.NDArray[Any]:
    return (scale * np.random.default_rng(5).normal(size=(count, 6))).astype(np.float32)


def test_private_step_is_that_of_torch_sample_by_sample(export: TrainStepExport, module: nn.Module) -> None:
    assert verify_train_step(export, module, TASK, privacy=PRIVACY, seed=3) < 1e-4


def test_step_with_another_clip_is_refused(export: TrainStepExport, module: nn.Module) -> None:
    with pytest.raises(ModelError, match="differs from torch"):
        verify_train_step(export, module, TASK, privacy=SamplePrivacy(2 * CLIP, 2.0))


def test_usual_step_does_not_pass_for_a_private_one() -> None:
    linear = nn.Sequential(nn.Linear(6, 3))
    usual = export_train_step(linear, TASK, (6,))
    assert "noise" not in usual.inputs
    with pytest.raises(ModelError, match="differs from torch"):
        verify_train_step(usual, linear, TASK, privacy=PRIVACY)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_one_sample_moves_the_sum_by_no_more_than_the_clip(
    export: TrainStepExport, module: nn.Module, scale: float
) -> None:
    x = samples(8)
    other = x.copy()
    other[3] *= scale
    difference = 8 * (run(export, module, x) - run(export, module, other))
    assert np.linalg.norm(difference) <= 2 * CLIP * (1 + 1e-4)


def test_weight_says_only_whether_a_sample_counts(export: TrainStepExport, module: nn.Module) -> None:
    x = samples(4)
    np.testing.assert_array_equal(run(export, module, x), run(export, module, x, weights=[9, 1e-3, 2, 1]))
    without = run(export, module, x, weights=[1, 1, 1, 0])
    assert np.abs(run(export, module, x) - without).max() > 1e-5


@pytest.mark.parametrize("count", [1, 4, 23])
def test_step_takes_any_number_of_samples(export: TrainStepExport, module: nn.Module, count: int) -> None:
    x, labels = samples(count), np.random.default_rng(2).integers(0, 3, count)
    total = np.zeros(export.params_size)
    for row in range(count):
        loss = TASK.sample_losses(
            module(torch.from_numpy(x[row : row + 1])),
            torch.empty(0),
            torch.from_numpy(labels[row : row + 1]),
        ).sum()
        own = torch.cat([grad.reshape(-1) for grad in torch.autograd.grad(loss, list(module.parameters()))])
        total -= own.double().numpy() * min(1.0, CLIP / float(own.double().norm()))
    moved = run(export, module, x, labels=labels)
    assert np.linalg.norm(moved - total / count) < 1e-4 * np.linalg.norm(total / count)


def test_noise_is_what_the_device_gives(export: TrainStepExport, module: nn.Module) -> None:
    x = samples(4)
    assert "noise" in export.inputs
    assert "seed" not in export.inputs
    moved = run(export, module, x, noise=3.0) - run(export, module, x)
    np.testing.assert_allclose(moved, -3.0 * 2.0 * CLIP / 4, rtol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(6),
        nn.Dropout(0.5),
        nn.InstanceNorm1d(6, track_running_stats=True),
        nn.GRU(6, 6, num_layers=2, dropout=0.5),
        nn.MultiheadAttention(6, 1, dropout=0.1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layer_without_a_private_step_is_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedLayerError) as caught:
        export_train_step(nn.Sequential(layer, nn.Linear(6, 3)), TASK, (6,), "sgd", PRIVACY)
    assert caught.value.facts["substitute"]


@pytest.mark.parametrize(("clip", "noise"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -0.1), (float("nan"), 1.0)])
def test_privacy_out_of_bounds_is_refused(clip: float, noise: float) -> None:
    with pytest.raises(ConfigurationError):
        SamplePrivacy(clip, noise)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("digits_mlp", "sgd"),
        ("digits_mlp", "adam"),
        ("watch_cnn1d", "sgd"),
        ("fashion_cnn", "sgd"),
        ("tiny_transformer", "adam"),
    ],
)
def test_zoo_model_has_a_private_step(name: str, optimizer: str) -> None:
    chosen = load(name)
    made = chosen.make_model()
    export = export_train_step(made, chosen.task, chosen.input_shape, optimizer, PRIVACY)
    assert verify_train_step(export, made, chosen.task, privacy=PRIVACY, seed=2) < 1e-3
