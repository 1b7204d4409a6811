"""Dropout in the train step: driven by the seed alone, a mask for each step and layer, the bits of torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from models import ort
from models.flat import flatten_params
from models.task import Task
from models.train_step import TrainStepExport, export_train_step
from models.train_step.dropout import CounterDropout, counter_bits

SAMPLES = 8


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def exported(module: nn.Module) -> TrainStepExport:
    return export_train_step(module, Task.classification(3), (6,))


def losses(export: TrainStepExport, module: nn.Module, seed: int, steps: int) -> npt.NDArray[np.float32]:
    """Losses of steps that change nothing (learning rate 0) over one batch: only the masks differ."""
    rng = np.random.default_rng(0)
    params = flatten_params(module)
    zero = np.array(0, np.float32)
    feeds = {
        "params": params,
        "opt_state": np.zeros(export.opt_state_size, np.float32),
        "x": rng.normal(size=(SAMPLES, 6)).astype(np.float32),
        "y": rng.integers(0, 3, SAMPLES),
        "weights": np.ones((steps, SAMPLES), np.float32),
        "index": np.tile(np.arange(SAMPLES), (steps, 1)),
        **dict.fromkeys(("lr", "momentum", "weight_decay", "mu"), zero),
        "anchor": params,
        "seed": np.array(seed, np.int64),
    }
    return ort.run(ort.make_session(export.model), feeds)["loss"]


def bits(seed: int, step: int, layer: int, size: int = 20_000) -> Tensor:
    return counter_bits(torch.empty(size), torch.tensor(seed), torch.tensor(step), layer)


def test_every_element_depends_on_the_seed() -> None:
    words = torch.stack([bits(seed, 0, 0, size=64) for seed in range(400)])
    assert all(len(set(column.tolist())) > 390 for column in words.T)
    assert (words.double().mean(0) / 2**32 - 0.5).abs().max() < 5 / (12 * 400) ** 0.5


def test_same_seed_gives_the_same_masks(exported: TrainStepExport, module: nn.Module) -> None:
    np.testing.assert_array_equal(losses(exported, module, 3, 4), losses(exported, module, 3, 4))


def test_each_step_and_seed_has_its_own_masks(exported: TrainStepExport, module: nn.Module) -> None:
    first, second = losses(exported, module, 3, 4), losses(exported, module, -4, 4)
    assert len(set(first.tolist()) | set(second.tolist())) == 8


def test_graph_draws_the_bits_that_torch_draws(exported: TrainStepExport, module: nn.Module) -> None:
    for seed in (0, 1, -1, 2**40 + 7, -(2**63)):
        actual = losses(exported, module, seed, 1)
        rng = np.random.default_rng(0)
        x = torch.from_numpy(rng.normal(size=(SAMPLES, 6)).astype(np.float32))
        y = torch.from_numpy(rng.integers(0, 3, SAMPLES))
        with CounterDropout(torch.tensor(seed), torch.tensor(0)):
            expected = nn.functional.cross_entropy(module.train()(x), y)
        np.testing.assert_allclose(actual[0], expected.detach().numpy(), rtol=1e-6)


def test_bits_are_uniform() -> None:
    words = bits(5, 0, 0)
    assert words.min() >= 0
    assert words.max() < 2**32
    counts = torch.bincount(words >> 28, minlength=16).double()
    expected = len(words) / 16
    assert ((counts - expected) ** 2 / expected).sum() < 45


@pytest.mark.parametrize("other", [(6, 0, 0), (5, 1, 0), (5, 0, 1), (5 + 2**32, 0, 0), (-5, 0, 0)])
def test_bits_of_another_seed_step_or_layer_are_independent(other: tuple[int, int, int]) -> None:
    keep, others = bits(5, 0, 0) < 2**31, bits(*other) < 2**31
    agreement = (keep == others).double().mean()
    assert 0.48 < agreement < 0.52


def test_dropout_of_one_half_keeps_one_half() -> None:
    x = torch.ones(100, 200)
    with CounterDropout(torch.tensor(1), torch.tensor(0)):
        dropped = nn.functional.dropout(x, 0.5)
        all_dropped, none_dropped = nn.functional.dropout(x, 1.0), nn.functional.dropout(x, 0.0)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert 0.97 < dropped.mean() < 1.03
    assert not all_dropped.any()
    assert torch.equal(none_dropped, x)
