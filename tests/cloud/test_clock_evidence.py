"""An aggregator whose clock runs ahead signs nothing: what speaks against a clock, and who is believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_server.clock_evidence import (
    BUILT,
    FEWEST_DEVICES,
    HEARD_SECONDS,
    ClockGuard,
    ClockLimits,
    DeviceClocks,
    Evidence,
    judge_clock,
)
from cloud_server.deployment import Deployment, initialise
from cloud_server.health import gather
from cloud_server.settings import ClockSettings, CloudSettings
from tests.cloud.deployment import SteppedClock
from wire.errors import ConfigurationError, TrustError

NOW = 1_800_000_000.0
DAY = 86_400.0
YEAR = 365 * DAY
LIMITS = ClockLimits()


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Evidence(now=NOW), ""),
        (Evidence(now=NOW, newest=NOW - 300 * DAY, database=NOW - 299, devices_ahead=299.0), ""),
        # Behind is another matter: devices have a floor, and `checks/clock.py` says so.
        (Evidence(now=NOW, newest=NOW + DAY, database=NOW + DAY, devices_ahead=-DAY), ""),
        (Evidence(now=0.0), "1970-01-01, which is before this program was made"),
        (Evidence(now=NOW + 14 * YEAR, newest=NOW), "5110 days after anything was last signed here"),
        (Evidence(now=NOW, database=NOW - 3600), "3600 s ahead of the database's"),
        (Evidence(now=NOW, devices_ahead=3600.0), "3600 s ahead of the devices'"),
        (Evidence(now=1e30, newest=NOW), "after anything"),
    ],
)
def test_clock_is_believed_until_something_speaks_against_it(found: Evidence, said: str) -> None:
    judged = judge_clock(found, LIMITS)
    assert said in judged
    assert bool(judged) == bool(said)


def test_operator_vouches_for_a_clock_up_to_a_date_and_never_for_one_before_the_build() -> None:
    limits = ClockSettings(vouched_until="2041-01-14").limits()
    ahead = Evidence(now=NOW + 14 * YEAR, newest=NOW, devices_ahead=14 * YEAR)
    assert judge_clock(ahead, limits) == ""
    assert judge_clock(Evidence(now=NOW + 15 * YEAR, newest=NOW), limits)
    assert judge_clock(Evidence(now=BUILT - 1), limits)
    with pytest.raises(ConfigurationError, match="no day"):
        ClockSettings(vouched_until="2041-02-30").limits()


# ---- the fleet's clocks ------------------------------------------------------------------------------------


def heard(*ahead: float) -> DeviceClocks:
    clocks = DeviceClocks()
    for index, seconds in enumerate(ahead):
        clocks.note(f"dev-{index}", NOW - seconds, monotonic=100.0)
    return clocks


def test_fleet_that_agrees_says_how_far_we_are_ahead() -> None:
    clocks = heard(3600.0, 3601.0, 3599.0, 3600.5, -9e8)
    assert clocks.ahead(NOW + 60.0, monotonic=160.0) == 3600.0


@pytest.mark.parametrize(
    "ahead",
    [
        (3600.0,) * (FEWEST_DEVICES - 1),
        # Clocks that nobody sets are wrong each in its own way.
        (3600.0, 90_000.0, 1.7e9, 40.0, 7e6, 500.0),
    ],
)
def test_few_devices_or_such_that_do_not_agree_say_nothing(ahead: tuple[float, ...]) -> None:
    assert heard(*ahead).ahead(NOW, monotonic=100.0) is None


def test_devices_that_were_heard_long_ago_say_nothing() -> None:
    clocks = heard(*(3600.0,) * 8)
    assert clocks.ahead(NOW, monotonic=100.0 + HEARD_SECONDS + 1.0) is None


def test_device_that_speaks_often_counts_once_and_memory_is_bounded() -> None:
    clocks = DeviceClocks()
    for told in range(10_000):
        clocks.note("loud", NOW - 3600.0 - told, monotonic=1.0)
    assert clocks.ahead(NOW, monotonic=1.0) is None
    for index in range(5_000):
        clocks.note(f"dev-{index}", NOW, monotonic=1.0)
    assert len(clocks._told) == 1024


# ---- who asks ----------------------------------------------------------------------------------------------


def test_guard_looks_again_at_once_when_somebody_sets_the_clock() -> None:
    clock, looks = SteppedClock(NOW), []

    def look() -> Evidence:
        looks.append(clock.now())
        return Evidence(now=clock.wall, newest=NOW)

    class Set(SteppedClock):
        wall = NOW

        def now(self) -> float:
            return self.wall

    clock = Set(100.0)
    guard = ClockGuard(clock, LIMITS, look)
    for _ in range(5):
        guard.check()
    assert len(looks) == 1
    clock.wall += 14 * YEAR
    with pytest.raises(TrustError, match="nothing is signed") as caught:
        guard.check()
    assert "clock.vouched_until" in caught.value.hint
    # It stays so until the clock is right again, without a restart.
    with pytest.raises(TrustError):
        guard.check()
    clock.wall -= 14 * YEAR
    guard.check()


def test_nothing_is_signed_by_a_clock_that_is_years_ahead_of_what_was_signed_last(tmp_path: Path) -> None:
    clock = SteppedClock(NOW)
    with initialise(tmp_path / "cloud", CloudSettings(), clock=clock) as deployment:
        before = deployment.repository.timestamp()
        clock.seconds += 14 * YEAR
        with pytest.raises(TrustError, match="5110 days"):
            deployment.repository.refresh()
        with pytest.raises(TrustError, match="5110 days"):
            deployment.check_clock()
        assert deployment.repository.timestamp() == before
        assert "5110 days" in gather(deployment).clock_trouble
        clock.seconds -= 14 * YEAR - DAY
        assert deployment.repository.refresh()
        assert gather(deployment).clock_trouble == ""


def test_operator_who_vouches_signs_on(tmp_path: Path) -> None:
    clock = SteppedClock(NOW)
    settings = CloudSettings(clock=ClockSettings(vouched_until="2041-12-31"))
    with initialise(tmp_path / "cloud", settings, clock=clock) as made:
        folder = made.folder
    clock.seconds += 14 * YEAR
    with Deployment(folder, settings, clock=clock) as deployment:
        deployment.check_clock()
        assert deployment.repository.refresh()
