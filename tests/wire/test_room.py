"""Room: as long as asked for, filled in place, taken without a copy."""

from __future__ import annotations

import tracemalloc

import pytest

from wire.room import room


@pytest.mark.parametrize("size", [0, 1, 2, 4096, 1_000_003])
def test_room_is_as_long_as_asked_and_holds_what_is_written(size: int) -> None:
    made = room(size)
    with made.getbuffer() as whole:
        assert len(whole) == size
        whole[:] = bytes(index % 251 for index in range(size))
    assert made.tell() == 0
    assert made.getvalue() == bytes(index % 251 for index in range(size))


def test_room_of_two_callers_is_not_the_same() -> None:
    first, second = room(32), room(32)
    first.write(b"a" * 32)
    second.write(b"b" * 32)
    assert first.getvalue() == b"a" * 32
    assert second.getvalue() == b"b" * 32


def test_room_is_taken_without_a_copy() -> None:
    tracemalloc.start()
    try:
        made = room(10_000_000)
        with made.getbuffer() as whole:
            whole[-1] = 1
        taken = made.getvalue()
        assert len(taken) == 10_000_000
        assert tracemalloc.get_traced_memory()[1] < 11_000_000
    finally:
        tracemalloc.stop()
