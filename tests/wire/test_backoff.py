"""The one rule by which a device tries again: full jitter, growing ceilings, hints within bounds."""

from __future__ import annotations

import random

import pytest

from wire.backoff import Backoff, Retries

POLICY = Backoff(first_seconds=1.0, cap_seconds=60.0, hint_cap_seconds=300.0)


def drawn(attempt: int, **hints: float) -> list[float]:
    rng = random.Random(7)
    return [POLICY.delay_seconds(attempt, rng, **hints) for _ in range(500)]


@pytest.mark.parametrize(("attempt", "most"), [(0, 1.0), (3, 8.0), (6, 60.0), (10_000, 60.0)])
def test_wait_is_drawn_from_the_whole_ceiling(attempt: int, most: float) -> None:
    delays = drawn(attempt)
    assert 0.0 <= min(delays) < 0.1 * most
    assert 0.9 * most < max(delays) <= most
    assert abs(sum(delays) / len(delays) - most / 2) < 0.1 * most, "drawn evenly"


def test_what_a_server_asks_for_is_the_least_wait_and_is_spread_again() -> None:
    delays = drawn(0, asked_seconds=30.0)
    assert 30.0 <= min(delays) < 33.0
    assert 57.0 < max(delays) <= 60.0


@pytest.mark.parametrize("asked", [301.0, 1e9, float("inf")])
def test_server_cannot_send_a_device_away_for_longer_than_its_bound(asked: float) -> None:
    assert max(drawn(0, asked_seconds=asked)) <= 2 * POLICY.hint_cap_seconds
    assert min(drawn(0, asked_seconds=-5.0)) < 0.1, "nor make it come back sooner than at once"


def test_fleet_that_is_asked_to_spread_does() -> None:
    delays = drawn(0, spread_seconds=20.0)
    tenths = [sum(number * 2 <= delay < number * 2 + 2 for delay in delays) for number in range(10)]
    assert min(tenths) > 20, f"of 500 devices so many come back in each tenth of the time: {tenths}"
    assert max(drawn(0, spread_seconds=1e9)) <= POLICY.hint_cap_seconds


def test_success_makes_the_next_failure_the_first_again() -> None:
    retries = Retries(POLICY, random.Random(3))
    assert [retries.failed() <= 2.0**number for number in range(6)] == [True] * 6
    assert retries.failures == 6
    retries.succeeded()
    assert retries.failed() <= 1.0


def test_first_attempt_is_made_at_once_unless_the_fleet_spreads() -> None:
    retries = Retries(POLICY, random.Random(3))
    assert retries.first_seconds() == 0.0
    retries.spread_seconds = 1e9
    assert 1.0 < retries.first_seconds() <= POLICY.hint_cap_seconds


def test_same_seed_waits_the_same() -> None:
    waits = [[Retries(POLICY, random.Random(seed)).failed() for _ in range(4)] for seed in (5, 5, 6)]
    assert waits[0] == waits[1] != waits[2]
