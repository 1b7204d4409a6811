"""Orders of a large cohort: each leaves once, in order, and no more are asked at a time than are heard."""

from __future__ import annotations

from cloud_server.db.rounds import OrderRow
from cloud_server.rounds.order_window import ASKED, SILENT_SECONDS, OrderWindow
from cloud_server.rounds.state import NEVER


def orders(count: int) -> dict[str, OrderRow]:
    return {
        f"d{number}": OrderRow(
            order_id=number.to_bytes(16, "big"),
            round_number=1,
            device=f"d{number}",
            node_id=number,
            kind="train",
            head_sha256=bytes(32),
            deadline=100.0,
        )
        for number in range(count)
    }


def filled(count: int) -> OrderWindow:
    window = OrderWindow()
    window.fill(orders(count))
    return window


def test_small_cohort_is_asked_at_once() -> None:
    window = filled(ASKED)
    assert [order.device for order in window.take(0.0)] == list(orders(ASKED))
    assert window.take(0.0) == []
    assert window.wait(0.0) == NEVER


def test_each_that_is_heard_makes_room_for_one() -> None:
    window = filled(ASKED + 5)
    window.take(0.0)
    assert window.take(1.0) == []
    for device in ("d3", "d7", "d7"):
        window.heard(device)
    assert [order.device for order in window.take(1.0)] == [f"d{ASKED}", f"d{ASKED + 1}"]
    assert f"d{ASKED + 1}" not in window
    assert f"d{ASKED + 2}" in window


def test_whoever_says_nothing_leaves_its_place_after_a_while() -> None:
    window = filled(3 * ASKED)
    window.take(0.0)
    assert window.wait(0.5) == SILENT_SECONDS - 0.5
    assert len(window.take(SILENT_SECONDS)) == ASKED
    assert len(window.take(2 * SILENT_SECONDS)) == ASKED
    assert window.wait(9.0) == NEVER


def test_rest_is_taken_at_once_in_its_order() -> None:
    window = filled(ASKED + 3)
    window.take(0.0)
    assert [order.device for order in window.take_all()] == [f"d{ASKED + more}" for more in range(3)]
    assert window.take_all() == []


def test_orders_of_a_collection_that_is_over_are_forgotten() -> None:
    window = filled(2 * ASKED)
    window.take(0.0)
    window.fill({})
    assert window.take(10.0) == []
    assert "d600" not in window
