"""The length of a vector: exact where float32 would overflow, whatever tiles it is summed in."""

from __future__ import annotations

import math

import numpy as np
import pytest

from wire.norm import l2_norm


@pytest.mark.parametrize("size", [0, 1, 5, 32_768, 32_769, 100_003])
def test_norm_is_the_root_of_the_exact_sum_of_squares(size: int) -> None:
    vector = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    exact = math.sqrt(math.fsum(float(value) ** 2 for value in vector))
    assert l2_norm(vector) == pytest.approx(exact, rel=1e-12)


def test_norm_of_the_largest_numbers_does_not_overflow() -> None:
    largest = float(np.finfo(np.float32).max)
    assert l2_norm(np.full(4, largest, np.float32)) == pytest.approx(2 * largest)
