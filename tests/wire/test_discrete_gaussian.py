"""The discrete Gaussian: exact by its own arithmetic, by its distribution, and the same for the same seed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from wire.discrete_gaussian import MAX_SIGMA, WordStream, discrete_gaussian, discrete_laplace
from wire.errors import ConfigurationError

SEED = bytes(range(32))
VECTOR = [825, -17, -565, -3218, 702, -1727]


def stream(number: int = 0, label: bytes = b"test") -> WordStream:
    return WordStream(number.to_bytes(32, "big"), label)


def chi_square(samples: np.ndarray, weights: dict[int, float]) -> tuple[float, int]:
    """Pearson's statistic over the values that are expected at least 10 times, and its degrees of freedom."""
    total = sum(weights.values())
    expected = {x: len(samples) * w / total for x, w in weights.items() if len(samples) * w / total >= 10}
    observed = {x: int((samples == x).sum()) for x in expected}
    rest = len(samples) - sum(observed.values())
    rest_expected = len(samples) - sum(expected.values())
    statistic = sum((observed[x] - e) ** 2 / e for x, e in expected.items())
    return statistic + (rest - rest_expected) ** 2 / max(rest_expected, 1.0), len(expected)


def is_likely(statistic: float, degrees: int) -> bool:
    """Below the 1 - 1e-6 quantile (Wilson and Hilferty's approximation)."""
    bound = degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3
    return statistic < bound


@pytest.mark.parametrize("sigma", [1, 2, 7, 40])
def test_samples_follow_the_discrete_gaussian(sigma: int) -> None:
    samples = discrete_gaussian(stream(sigma), sigma, 200_000)
    weights = {x: math.exp(-(x**2) / (2 * sigma**2)) for x in range(-12 * sigma, 12 * sigma + 1)}
    assert is_likely(*chi_square(samples, weights))


def test_samples_of_another_sigma_do_not_pass_for_it() -> None:
    samples = discrete_gaussian(stream(), 42, 200_000)
    weights = {x: math.exp(-(x**2) / (2 * 40**2)) for x in range(-480, 481)}
    assert not is_likely(*chi_square(samples, weights))


@pytest.mark.parametrize("scale", [1, 3, 20])
def test_laplace_samples_follow_their_distribution(scale: int) -> None:
    samples = discrete_laplace(stream(scale), scale, 300_000)
    weights = {x: math.exp(-abs(x) / scale) for x in range(-40 * scale, 40 * scale + 1)}
    assert is_likely(*chi_square(samples, weights))


@pytest.mark.parametrize("sigma", [2**12, 2**20, MAX_SIGMA])
def test_large_sigma_has_the_moments_of_a_gaussian(sigma: int) -> None:
    scaled = discrete_gaussian(stream(sigma), sigma, 100_000) / sigma
    assert abs(scaled.mean()) < 5 / math.sqrt(len(scaled))
    assert abs((scaled**2).mean() - 1) < 5 * math.sqrt(2 / len(scaled))
    assert abs((scaled**4).mean() - 3) < 5 * math.sqrt(96 / len(scaled))
    assert 3.7 < np.abs(scaled).max() < 6


def test_low_bits_are_uniform() -> None:
    low = discrete_gaussian(stream(), 2**20, 100_000) & 255
    assert is_likely(*chi_square(low, dict.fromkeys(range(256), 1.0)))


def test_same_seed_gives_the_same_samples_and_another_seed_or_label_others() -> None:
    first = discrete_gaussian(WordStream(SEED, b"a"), 1000, 500)
    np.testing.assert_array_equal(first, discrete_gaussian(WordStream(SEED, b"a"), 1000, 500))
    for other in (WordStream(SEED, b"b"), WordStream(SEED[::-1], b"a")):
        assert (first != discrete_gaussian(other, 1000, 500)).mean() > 0.9


def test_samples_are_those_of_the_first_version() -> None:
    """Noise that is drawn again after an update of the software must be the same noise."""
    found = discrete_gaussian(WordStream(SEED, b"vector"), 1000, 6)
    assert found.tolist() == VECTOR


def test_words_are_one_stream_however_they_are_taken() -> None:
    whole = stream().take(20_000)
    parts = stream()
    np.testing.assert_array_equal(whole, np.concatenate([parts.take(n) for n in (1, 0, 9_999, 10_000)]))


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 2**33 + 1, 2**63 + 1])
def test_words_below_a_bound_are_uniform(bound: int) -> None:
    words = stream(bound % 97).below(np.full(60_000, bound, np.uint64))
    assert int(words.max()) < bound
    # A large bound is cut into sixths, which are equally likely to within 1e-9.
    parts = np.array([int(Fraction(int(word) * 6, bound)) for word in words]) if bound > 7 else words
    kinds = bound if bound <= 7 else 6
    assert bound == 1 or is_likely(*chi_square(parts.astype(np.int64), dict.fromkeys(range(kinds), 1.0)))


@pytest.mark.parametrize("sigma", [0, -1, MAX_SIGMA + 1])
def test_sigma_out_of_bounds_is_refused(sigma: int) -> None:
    with pytest.raises(ConfigurationError):
        discrete_gaussian(stream(), sigma, 1)


def test_seed_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        WordStream(b"short", b"")


def test_no_sample_is_an_empty_array() -> None:
    assert discrete_gaussian(stream(), 5, 0).tolist() == []
