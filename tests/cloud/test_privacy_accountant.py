"""Epsilon: against the closed form of the unsampled Gaussian, known values, and what must never be."""

from __future__ import annotations

import math

import pytest

from cloud_server.privacy.accountant import Mechanism, epsilon_of, noise_for, rounds_left
from wire.errors import ConfigurationError

DELTA = 1e-5


def gaussian_delta(epsilon: float, noise_multiplier: float, rounds: int) -> float:
    """The exact delta of composed Gaussian mechanisms (Balle and Wang, arXiv:1805.06530, theorem 8)."""
    mu = math.sqrt(rounds) / noise_multiplier

    def below(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return below(mu / 2 - epsilon / mu) - math.exp(epsilon) * below(-mu / 2 - epsilon / mu)


def gaussian_epsilon(noise_multiplier: float, rounds: int) -> float:
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if gaussian_delta(middle, noise_multiplier, rounds) > DELTA else (low, middle)
        )
    return high


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (4.0, 1), (2.0, 10), (8.0, 100), (20.0, 100)])
def test_unsampled_rounds_cost_what_the_closed_form_says(noise: float, rounds: int) -> None:
    exact = gaussian_epsilon(noise, rounds)
    found = epsilon_of([(Mechanism(noise, 1.0), rounds)], DELTA)
    # Rounded up: never more is promised than there is, and little is lost.
    assert exact <= found <= 1.002 * exact + 0.001


@pytest.mark.parametrize(("epsilon", "noise"), [(8.0, 0.94), (3.0, 1.67), (1.0, 3.94)])
def test_noise_of_a_hundred_rounds_at_a_tenth_is_the_known_one(epsilon: float, noise: float) -> None:
    assert noise_for(epsilon, DELTA, 0.1, 100) == pytest.approx(noise, rel=0.008)


def test_huge_epsilon_is_bounded_at_no_cost() -> None:
    assert 1000 < epsilon_of([(Mechanism(0.05, 0.5), 1000)], DELTA) < math.inf


def test_nothing_spent_is_nothing() -> None:
    assert epsilon_of([], DELTA) == 0.0
    assert epsilon_of([(Mechanism(1.0, 0.1), 0)], DELTA) == 0.0


def test_more_rounds_less_noise_and_a_larger_rate_cost_more() -> None:
    base = epsilon_of([(Mechanism(1.0, 0.1), 10)], DELTA)
    assert base < epsilon_of([(Mechanism(1.0, 0.1), 11)], DELTA)
    assert base < epsilon_of([(Mechanism(0.9, 0.1), 10)], DELTA)
    assert base < epsilon_of([(Mechanism(1.0, 0.2), 10)], DELTA)


def test_order_and_grouping_of_rounds_do_not_matter() -> None:
    one, two = Mechanism(1.0, 0.1), Mechanism(2.0, 0.3)
    together = epsilon_of([(one, 4), (two, 3)], DELTA)
    assert together == pytest.approx(epsilon_of([(two, 1), (one, 4), (two, 2)], DELTA), rel=1e-6)
    assert together > epsilon_of([(one, 4)], DELTA)


def test_rounds_left_are_the_last_that_fit() -> None:
    mechanism, spent = Mechanism(1.0, 0.1), [(Mechanism(2.0, 0.5), 3)]
    left = rounds_left(spent, mechanism, 4.0, DELTA)
    assert left > 0
    assert epsilon_of([*spent, (mechanism, left)], DELTA) <= 4.0
    assert epsilon_of([*spent, (mechanism, left + 1)], DELTA) > 4.0


def test_rounds_left_of_a_spent_budget_are_none() -> None:
    assert rounds_left([(Mechanism(0.5, 1.0), 50)], Mechanism(1.0, 0.1), 1.0, DELTA) == 0


def test_noise_that_no_multiplier_reaches_is_refused() -> None:
    with pytest.raises(ConfigurationError):
        noise_for(1e-4, DELTA, 1.0, 10**9)
