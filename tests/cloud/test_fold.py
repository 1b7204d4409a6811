"""The fold: exact, in constant memory, loud about a device that is not there."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch

from cloud_server.aggregate.fold import Fold, choose_device
from wire.errors import ConfigurationError, UpdateError

RNG = np.random.default_rng(5)


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-15), ("float32", 2e-7)])
def test_fold_is_the_weighted_mean(precision: str, tolerance: float) -> None:
    vectors = RNG.normal(0, 1, (40, 1000)).astype(np.float32)
    weights = RNG.integers(1, 500, 40)
    fold = Fold(1000, precision=precision)
    for vector, weight in zip(vectors, weights, strict=True):
        fold.add(vector, int(weight))
    expected = (weights[:, None] * vectors.astype(np.float64)).sum(0) / weights.sum()
    np.testing.assert_allclose(fold.mean(), expected, rtol=0, atol=tolerance * 4)
    assert (fold.count, fold.total_weight) == (40, float(weights.sum()))


def test_fold_of_one_vector_gives_it_back() -> None:
    vector = RNG.normal(0, 1, 100).astype(np.float32)
    fold = Fold(100)
    fold.add(vector, 3)
    np.testing.assert_array_equal(fold.mean().astype(np.float32), vector)


def test_fold_in_another_order_gives_the_same_float32() -> None:
    vectors = RNG.normal(0, 1, (30, 500)).astype(np.float32)
    means = []
    for order in (range(30), reversed(range(30))):
        fold = Fold(500)
        for i in order:
            fold.add(vectors[i], i + 1)
        means.append(fold.mean().astype(np.float32))
    np.testing.assert_array_equal(*means)


def test_fold_reads_the_vector_before_it_returns() -> None:
    vector = np.ones(4, np.float32)
    fold = Fold(4)
    fold.add(vector, 1)
    vector[:] = 9
    np.testing.assert_array_equal(fold.mean(), np.ones(4))


def test_fold_takes_a_read_only_vector() -> None:
    vector = np.ones(4, np.float32)
    vector.setflags(write=False)
    fold = Fold(4)
    fold.add(vector, 2)
    assert fold.mean().tolist() == [1, 1, 1, 1]


def test_fold_of_no_buffers_is_empty() -> None:
    fold = Fold(0)
    fold.add(np.zeros(0, np.float32), 1)
    assert fold.mean().shape == (0,)


@pytest.mark.parametrize("vector", [np.ones(3, np.float32), np.ones((4, 1), np.float32), np.ones(4)])
def test_fold_of_another_shape_or_type_is_refused(vector: np.ndarray) -> None:  # type: ignore[type-arg]
    fold = Fold(4)
    with pytest.raises(UpdateError):
        fold.add(vector, 1)
    assert fold.count == 0


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_fold_with_a_senseless_weight_is_refused(weight: float) -> None:
    fold = Fold(4)
    with pytest.raises(UpdateError):
        fold.add(np.ones(4, np.float32), weight)
    assert fold.count == 0


def test_fold_of_nothing_has_no_mean() -> None:
    with pytest.raises(UpdateError):
        Fold(4).mean()


def test_unknown_precision_is_an_error_with_a_hint() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Fold(4, precision="float16")
    assert "float64" in caught.value.hint


def test_choose_device_of_a_missing_gpu_falls_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    count = torch.cuda.device_count()
    with caplog.at_level(logging.WARNING):
        device = choose_device("cuda:63")
    assert device == torch.device("cpu")
    (record,) = caplog.records
    assert vars(record)["fields"] == {"wanted": "cuda:63", "cuda_devices": count, "using": "cpu"}


def test_choose_device_of_the_cpu_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert not caplog.records


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps:0", ""])
def test_choose_device_of_an_unknown_name_is_an_error(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        choose_device(name)
    assert "cuda" in caught.value.hint
