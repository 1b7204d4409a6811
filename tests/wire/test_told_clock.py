"""A device's clock beside its heartbeat: there and back, and whatever else may lie there."""

from __future__ import annotations

import pytest

from wire.told_clock import CLOCK_EXTENSION, clock_extension, told_clock


@pytest.mark.parametrize(("now", "told"), [(1_800_000_000.9, 1_800_000_000.0), (0.0, 0.0), (-5.0, 0.0)])
def test_clock_comes_as_it_was_told(now: float, told: float) -> None:
    assert told_clock(clock_extension(now)) == told


def test_bytes_of_the_clock_are_eight_big_endian() -> None:
    assert clock_extension(1_800_000_000) == {-1: bytes.fromhex("000000006b49d200")}


@pytest.mark.parametrize(
    "extensions", [{}, {CLOCK_EXTENSION: b""}, {CLOCK_EXTENSION: b"123456789"}, {-2: bytes(8)}]
)
def test_what_is_no_clock_says_nothing(extensions: dict[int, bytes]) -> None:
    assert told_clock(extensions) is None
