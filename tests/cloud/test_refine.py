"""Refinement: it learns, keeps its bound, repeats itself, and never hands back what is not finite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from cloud_server.refine.reference import reference_of
from cloud_server.refine.refinement import RefineConfig, Refinery
from models.flat import flatten_buffers, flatten_params
from models.task import Task
from wire.checkpoint import Checkpoint
from wire.errors import ConfigurationError, DataError

RNG = np.random.default_rng(3)
X = RNG.normal(0, 1, (200, 8)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.int64)


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def refinery(config: RefineConfig, make: Callable[[], nn.Module] = make_module) -> Refinery:
    return Refinery(make, Task.classification(2), X, Y, config=config)


def start() -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    module = make_module()
    return flatten_params(module), flatten_buffers(module)


@pytest.mark.parametrize("is_mixed", [True, False])
def test_refinement_lowers_the_loss(is_mixed: bool) -> None:
    config = RefineConfig(epochs=8, learning_rate=0.05, max_change=100.0, is_mixed=is_mixed)
    refined = refinery(config).refine(*start(), seed=1)
    assert refined.loss_last < 0.6 * refined.loss_first
    assert not refined.was_cut
    assert refined.params.dtype == np.float32


def test_mixed_precision_learns_what_float32_learns() -> None:
    config = RefineConfig(epochs=8, learning_rate=0.05, max_change=100.0)
    mixed = refinery(config).refine(*start(), seed=1)
    plain = refinery(RefineConfig(epochs=8, learning_rate=0.05, max_change=100.0, is_mixed=False)).refine(
        *start(), seed=1
    )
    assert mixed.loss_last == pytest.approx(plain.loss_last, abs=0.02)


def test_change_is_cut_to_its_bound_and_keeps_its_direction() -> None:
    params, buffers = start()
    free = refinery(RefineConfig(epochs=3, max_change=100.0)).refine(params, buffers, seed=1)
    cut = refinery(RefineConfig(epochs=3, max_change=0.1)).refine(params, buffers, seed=1)
    assert cut.was_cut
    change = cut.params - params
    assert float(np.linalg.norm(change)) == pytest.approx(0.1, rel=1e-4)
    wanted = free.params - params
    cosine = float(change @ wanted) / float(np.linalg.norm(change) * np.linalg.norm(wanted))
    assert cosine == pytest.approx(1.0, abs=1e-4)


def test_same_seed_gives_the_same_parameters() -> None:
    config = RefineConfig(epochs=2)
    one, two = refinery(config), refinery(config)
    first = one.refine(*start(), seed=5).params
    np.testing.assert_array_equal(first, two.refine(*start(), seed=5).params)
    np.testing.assert_array_equal(first, one.refine(*start(), seed=5).params)
    assert not np.array_equal(first, one.refine(*start(), seed=6).params)


def test_no_epochs_change_nothing() -> None:
    params, buffers = start()
    refined = refinery(RefineConfig()).refine(params, buffers, seed=1)
    np.testing.assert_array_equal(refined.params, params)
    assert refined.change == 0.0


def test_a_result_that_is_not_finite_is_thrown_away() -> None:
    params, buffers = start()
    config = RefineConfig(epochs=3, learning_rate=1e30, momentum=0.0, is_mixed=False)
    refined = refinery(config).refine(params, buffers, seed=1)
    np.testing.assert_array_equal(refined.params, params)
    assert refined.change == 0.0


def test_an_autoencoder_is_refined_without_labels() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 8))

    config = RefineConfig(epochs=10, learning_rate=0.1, max_change=100.0)
    module = make()
    refined = Refinery(make, Task.anomaly(), X, Y, config=config).refine(
        flatten_params(module), flatten_buffers(module), seed=1
    )
    assert refined.loss_last < refined.loss_first


def test_labels_that_are_missing_are_an_error() -> None:
    with pytest.raises(DataError) as caught:
        Refinery(make_module, Task.classification(2), X, Y[:-1], config=RefineConfig())
    assert caught.value.hint


@pytest.mark.parametrize(
    "changes", [{"epochs": -1}, {"batch_size": 0}, {"max_change": -1.0}, {"learning_rate": float("nan")}]
)
def test_configuration_out_of_bounds_is_an_error_that_names_it(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RefineConfig(**changes)  # type: ignore[arg-type]
    assert caught.value.facts["name"] in changes


# ---- what FLTrust measures by ------------------------------------------------------------------------------


def test_descent_is_how_the_loss_of_all_data_falls() -> None:
    params, buffers = start()
    subject = refinery(
        RefineConfig(epochs=1, learning_rate=1e-3, momentum=0.0, batch_size=200, is_mixed=False)
    )
    descent = subject.descent(params, buffers)
    one_step = subject.refine(params, buffers, seed=1).params - params
    np.testing.assert_allclose(1e-3 * descent, one_step, atol=1e-7)
    assert float(np.linalg.norm(descent)) > 0.01


def test_reference_goes_where_training_and_the_slope_go() -> None:
    params, buffers = start()
    subject = refinery(RefineConfig(epochs=2, learning_rate=0.05, max_change=2.0, is_mixed=False))
    trained = subject.refine(params, buffers, seed=4).params - params
    slope = subject.descent(params, buffers)
    base = Checkpoint(params, buffers, np.zeros((0, 2), np.float32))
    led = reference_of(subject)(base, 4) - params
    expected = trained + slope * np.linalg.norm(trained) / np.linalg.norm(slope)
    np.testing.assert_allclose(led, expected, atol=1e-6)
    np.testing.assert_array_equal(reference_of(subject)(base, 4) - params, led)
