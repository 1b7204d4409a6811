"""DP-SGD as an exported graph: what torch computes sample by sample, no sample above its bound, noise by the seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from models import ort
from models.flat import flatten_params
from models.task import Task
from models.train_step import SamplePrivacy, TrainStepExport, export_train_step, verify_train_step
from models.train_step.sample_privacy import gaussian
from models.zoo import load
from wire.errors import ConfigurationError, ModelError, UnsupportedLayerError

TASK = Task.classification(3)
CLIP = 0.05
NOISELESS, NOISY = SamplePrivacy(CLIP, 0.0), SamplePrivacy(CLIP, 2.0)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def noiseless(module: nn.Module) -> TrainStepExport:
    return export_train_step(module, TASK, (6,), "sgd", NOISELESS)


@pytest.fixture(scope="module")
def noisy(module: nn.Module) -> TrainStepExport:
    return export_train_step(module, TASK, (6,), "sgd", NOISY)


def run(
    export: TrainStepExport, module: nn.Module, x: npt.NDArray[Any], *, seed: int = 1, weights: Any = None
) -> npt.NDArray[Any]:
    """How one step with a learning rate of 1 moves the parameters."""
    params = flatten_params(module)
    rng = np.random.default_rng(0)
    feeds = {
        "params": params,
        "opt_state": np.zeros(export.opt_state_size, np.float32),
        "x": x,
        "y": rng.integers(0, 3, len(x)),
        "weights": (np.ones(len(x)) if weights is None else np.asarray(weights)).astype(np.float32)[None],
        "index": np.arange(len(x))[None],
        **dict.fromkeys(("momentum", "weight_decay", "mu"), np.array(0, np.float32)),
        "lr": np.array(1, np.float32),
        "anchor": params,
        "seed": np.array(seed, np.int64),
    }
    session = ort.make_session(export.model)
    known = {name: value for name, value in feeds.items() if name in export.inputs}
    return ort.run(session, known)["params_out"] - params


def samples(count: int, scale: float = 1.0) -> npt.NDArray[Any]:
    return (scale * np.random.default_rng(5).normal(size=(count, 6))).astype(np.float32)


def test_private_step_is_that_of_torch_sample_by_sample(noisy: TrainStepExport, module: nn.Module) -> None:
    assert verify_train_step(noisy, module, TASK, privacy=NOISY, seed=3) < 1e-4


def test_step_with_another_clip_is_refused(noiseless: TrainStepExport, module: nn.Module) -> None:
    with pytest.raises(ModelError, match="differs from torch"):
        verify_train_step(noiseless, module, TASK, privacy=SamplePrivacy(2 * CLIP, 0.0))


def test_usual_step_does_not_pass_for_a_private_one(module: nn.Module) -> None:
    usual = export_train_step(module, TASK, (6,))
    with pytest.raises(ModelError, match="differs from torch"):
        verify_train_step(usual, module, TASK, privacy=NOISELESS)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_one_sample_moves_the_sum_by_no_more_than_the_clip(
    noiseless: TrainStepExport, module: nn.Module, scale: float
) -> None:
    x = samples(8)
    other = x.copy()
    other[3] *= scale
    difference = 8 * (run(noiseless, module, x) - run(noiseless, module, other))
    assert np.linalg.norm(difference) <= 2 * CLIP * (1 + 1e-4)


def test_weight_says_only_whether_a_sample_counts(noiseless: TrainStepExport, module: nn.Module) -> None:
    x = samples(4)
    np.testing.assert_array_equal(
        run(noiseless, module, x), run(noiseless, module, x, weights=[9, 1e-3, 2, 1])
    )
    without = run(noiseless, module, x, weights=[1, 1, 1, 0])
    assert np.abs(run(noiseless, module, x) - without).max() > 1e-5


def test_noise_follows_from_the_seed(noisy: TrainStepExport, module: nn.Module) -> None:
    x = samples(4)
    first = run(noisy, module, x, seed=7)
    np.testing.assert_array_equal(first, run(noisy, module, x, seed=7))
    assert np.abs(first - run(noisy, module, x, seed=8)).min() > 0


def test_noise_has_the_size_that_was_asked_for(
    noisy: TrainStepExport, noiseless: TrainStepExport, module: nn.Module
) -> None:
    x = samples(4)
    clean = run(noiseless, module, x)
    noise = np.concatenate([run(noisy, module, x, seed=s) - clean for s in range(40)]) * 4 / (2.0 * CLIP)
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)


def test_gaussian_of_the_counter_hash_is_one() -> None:
    noise = gaussian(torch.empty(200_000), torch.tensor(11), torch.tensor(2)).double().numpy()
    grid = np.sort(noise)
    expected = torch.special.ndtr(torch.from_numpy(grid)).numpy()
    distance = np.abs(expected - (np.arange(grid.size) + 0.5) / grid.size).max()
    # Kolmogorov and Smirnov's bound at 1e-6.
    assert distance < 2.7 / np.sqrt(grid.size)


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(6),
        nn.Dropout(0.5),
        nn.InstanceNorm1d(6, track_running_stats=True),
        nn.Conv1d(6, 6, 1),
        nn.MultiheadAttention(6, 1, dropout=0.1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layer_without_a_private_step_is_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedLayerError) as caught:
        export_train_step(nn.Sequential(layer, nn.Linear(6, 3)), TASK, (6,), "sgd", NOISY)
    assert caught.value.facts["substitute"]


@pytest.mark.parametrize(("clip", "noise"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -0.1), (float("nan"), 1.0)])
def test_privacy_out_of_bounds_is_refused(clip: float, noise: float) -> None:
    with pytest.raises(ConfigurationError):
        SamplePrivacy(clip, noise)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_zoo_model_has_a_private_step(optimizer: str) -> None:
    chosen = load("digits_mlp")
    made = chosen.make_model()
    export = export_train_step(made, chosen.task, chosen.input_shape, optimizer, NOISY)
    assert verify_train_step(export, made, chosen.task, privacy=NOISY, seed=2) < 1e-3
