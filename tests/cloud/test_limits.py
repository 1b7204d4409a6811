"""How often strangers are let through."""

from __future__ import annotations

import pytest

from cloud_server.enrolment.limits import MAX_ADDRESSES, RateLimit
from tests.cloud.deployment import SteppedClock


def through(limit: RateLimit, address: str, tries: int) -> int:
    """How many of so many requests at once come through."""
    return sum(limit.take(address) == 0.0 for _ in range(tries))


def test_address_comes_through_so_often_and_again_as_time_passes() -> None:
    clock = SteppedClock()
    limit = RateLimit(clock, per_address=60, overall=1000)
    assert through(limit, "192.0.2.1", 100) == 60
    clock.seconds += 10.0
    assert through(limit, "192.0.2.1", 100) == 10
    assert limit.take("192.0.2.1") == pytest.approx(1.0)
    assert through(limit, "192.0.2.2", 100) == 60
    clock.seconds += 3600.0
    assert through(limit, "192.0.2.1", 100) == 60


def test_all_addresses_together_come_through_so_often() -> None:
    limit = RateLimit(SteppedClock(), per_address=10, overall=25)
    assert [through(limit, f"192.0.2.{n}", 10) for n in range(5)] == [10, 10, 5, 0, 0]


def test_address_that_is_refused_takes_nothing_from_the_others() -> None:
    limit = RateLimit(SteppedClock(), per_address=5, overall=10)
    assert through(limit, "192.0.2.1", 1000) == 5
    assert through(limit, "192.0.2.2", 1000) == 5


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("fe80::1%eth0", "fe80::1", True),
        ("", "somewhere", False),
    ],
)
def test_addresses_of_one_owner_are_one(one: str, other: str, same: bool) -> None:
    limit = RateLimit(SteppedClock(), per_address=1, overall=10)
    assert limit.take(one) == 0.0
    assert (limit.take(other) > 0.0) is same


def test_addresses_without_end_take_bounded_memory() -> None:
    limit = RateLimit(SteppedClock(), per_address=1, overall=1)
    for number in range(MAX_ADDRESSES + 100):
        limit.take(str(number))
    assert len(limit._by_address) == MAX_ADDRESSES


def test_clock_that_goes_back_gives_nothing_away() -> None:
    clock = SteppedClock()
    limit = RateLimit(clock, per_address=5, overall=100)
    assert through(limit, "a", 10) == 5
    clock.seconds -= 1000.0
    assert through(limit, "a", 10) == 0
