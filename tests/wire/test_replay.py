"""The replay window against a plain set of everything that was ever let in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from wire.errors import ReplayError, StorageError
from wire.replay import WINDOW_BITS, Window

NEAR = st.integers(0, 200)


class WindowAgainstSet(RuleBasedStateMachine):
    """Sends numbers in any order and twice, restarts from the row, and starts new epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.window = Window()
        self.seen: set[tuple[int, int]] = set()

    @rule(epoch=st.integers(0, 3), seq=NEAR | st.just(2**63 - 1))
    def send(self, epoch: int, seq: int) -> None:
        newest = max((number for number, _ in self.seen), default=epoch)
        highest = max((number for at, number in self.seen if at == newest), default=-1)
        behind = epoch < newest or (epoch == newest and seq <= highest - WINDOW_BITS)
        if behind or (epoch, seq) in self.seen:
            with pytest.raises(ReplayError) as caught:
                self.window.accept(epoch, seq)
            assert caught.value.reason == ("behind" if behind else "seen")
        else:
            self.window = self.window.accept(epoch, seq)
            self.seen.add((epoch, seq))

    @rule()
    def restart(self) -> None:
        row = self.window.to_row()
        assert all(-(2**63) <= number < 2**63 for number in row)
        self.window = Window.from_row(*row)

    @invariant()
    def nothing_is_let_in_twice(self) -> None:
        for epoch, seq in self.seen:
            with pytest.raises(ReplayError):
                self.window.accept(epoch, seq)


TestWindowAgainstSet = WindowAgainstSet.TestCase


@pytest.mark.parametrize(("epoch", "seq"), [(-1, 0), (0, -1), (2**63, 0), (0, 2**63)])
def test_window_refuses_numbers_out_of_bounds(epoch: int, seq: int) -> None:
    with pytest.raises(ReplayError):
        Window().accept(epoch, seq)


def test_window_lets_in_63_behind_and_refuses_64() -> None:
    window = Window().accept(1, 100)
    assert window.accept(1, 37).highest == 100
    with pytest.raises(ReplayError) as caught:
        window.accept(1, 36)
    assert caught.value.reason == "behind"


@given(st.integers(), st.integers(), st.integers())
def test_any_row_gives_a_window_or_our_error(epoch: int, highest: int, bitmap: int) -> None:
    try:
        window = Window.from_row(epoch, highest, bitmap)
    except StorageError:
        return
    assert window.to_row() == (epoch, highest, bitmap)


@pytest.mark.parametrize("row", [(0, -1, 1), (0, 5, 2), (0, 0, 3), (0, 5, 0), (-1, 0, 1), (0, 2, 9)])
def test_damaged_row_is_refused(row: tuple[int, int, int]) -> None:
    with pytest.raises(StorageError):
        Window.from_row(*row)
