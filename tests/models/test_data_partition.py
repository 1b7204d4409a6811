"""The Dirichlet partition: every sample once, skewed by a small alpha, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.data.partition import partition_dirichlet
from wire.errors import ConfigurationError


@settings(max_examples=25, deadline=None)
@given(devices=st.integers(1, 20), alpha=st.floats(0.1, 100.0), seed=st.integers(0, 2**32))
def test_partition_gives_every_sample_to_one_device(devices: int, alpha: float, seed: int) -> None:
    labels = (np.arange(2_000) * 7 % 10).astype(np.int64)
    shares = partition_dirichlet(labels, devices, alpha, seed, smallest=1)
    assert len(shares) == devices
    assert sorted(np.concatenate(shares).tolist()) == list(range(2_000))
    again = partition_dirichlet(labels, devices, alpha, seed, smallest=1)
    assert all(np.array_equal(a, b) for a, b in zip(shares, again, strict=True))


def test_partition_is_skewed_by_a_small_alpha() -> None:
    labels = (np.arange(10_000) % 10).astype(np.int64)

    def largest_share(alpha: float) -> float:
        shares = partition_dirichlet(labels, 10, alpha, 3)
        return float(np.mean([np.bincount(labels[s], minlength=10).max() / len(s) for s in shares]))

    assert largest_share(0.1) > 0.4
    assert largest_share(1000.0) < 0.15


@pytest.mark.parametrize(("devices", "alpha"), [(0, 1.0), (10, 0.0), (10, float("nan")), (1_000, 1.0)])
def test_impossible_partition_is_refused(devices: int, alpha: float) -> None:
    with pytest.raises(ConfigurationError):
        partition_dirichlet(np.zeros(1_000, np.int64), devices, alpha, 0)
