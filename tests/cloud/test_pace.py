"""What a fleet is asked to spread over, by its size, and that it is told again when that changes."""

from __future__ import annotations

import pytest

from cloud_server.pace import MOST_SECONDS, Hints, Pace


@pytest.mark.parametrize(
    ("devices", "reconnect", "spread"),
    [(0, 0, 0), (4, 0, 0), (50, 0, 4), (51, 2, 4), (1_000, 32, 64), (10_000, 256, 512), (10**7, 3600, 3600)],
)
def test_hint_grows_with_the_fleet_in_powers_of_two(devices: int, reconnect: int, spread: int) -> None:
    assert Pace(50.0, 20.0).hints(devices) == Hints(reconnect, spread)


def test_rate_is_kept_and_the_hint_stays_when_a_few_devices_come() -> None:
    pace = Pace(50.0, 20.0)
    for devices in range(51, 100_000, 997):
        hints = pace.hints(devices)
        assert devices / hints.reconnect_seconds <= 50.0
        assert hints.reconnect_seconds <= min(MOST_SECONDS, 2 * devices / 50.0)
    assert len({pace.hints(devices) for devices in range(900, 1_000)}) == 1


def test_rate_of_nothing_asks_for_nothing() -> None:
    assert Pace(0.0, 0.0).hints(10**6) == Hints()
