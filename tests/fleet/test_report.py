"""The report's figures and its page."""

from __future__ import annotations

import json

from fleet.page import render_page
from fleet.report import DeviceRow, FleetReport, ReleaseRow, RoundRow, SwapRow, render_table


def report(**changes: object) -> FleetReport:
    device = DeviceRow("a-left", "a", 30, 0.5, 0.9, 2, 100, 1600, 300, 400, 10, 0)
    other = DeviceRow("b-left", "b", 10, 0.9, 0.7, 2, 100, 1600, 300, 400, 10, 1)
    values: dict[str, object] = {
        "title": "a <fleet>",
        "seed": 3,
        "split_hash": "ab" * 32,
        "devices": (device, other),
        "rounds": (
            RoundRow(1, "done", 2, 0.4, "held: no_gain", 2.0),
            RoundRow(2, "done", 2, 0.8, "released 2", 4.0),
        ),
        "releases": (ReleaseRow(1, 0, 0.6), ReleaseRow(2, 2, 0.85)),
        "swaps": (SwapRow("a-left", 2, 5, 0),),
    }
    return FleetReport(**{**values, **changes})  # type: ignore[arg-type]


def test_report_pools_accuracy_over_windows_and_not_over_devices() -> None:
    summary = report().summary()
    assert summary["accuracy_first"] == 0.6
    assert summary["accuracy_last"] == 0.85
    assert summary["update_bytes_ratio"] == 0.0625
    assert summary["round_seconds_median"] == 3.0
    assert (summary["inference_requests"], summary["inference_errors"]) == (20, 1)
    assert summary["hold_backs"] == 1


def test_report_of_a_simulation_holds_no_times() -> None:
    rows = tuple(RoundRow(row.number, row.state, row.replies, None, row.decision) for row in report().rounds)
    text = report(rounds=rows).to_json()
    assert "seconds" not in text
    assert json.loads(text)["rounds"] == 2


def test_page_shows_every_hold_back_and_escapes_what_it_shows() -> None:
    page = render_page(report())
    assert "held: no_gain" in page
    assert "a &lt;fleet&gt;" in page
    assert "<fleet>" not in page
    assert page.count("<svg") == 2
    assert "http" not in page.split("<body>")[1].split("<svg")[0]


def test_page_is_the_same_for_the_same_report() -> None:
    assert render_page(report()) == render_page(report())


def test_table_ends_with_the_totals() -> None:
    table = render_table(report())
    assert "a-left" in table
    assert "0.600   0.850  +0.250" in table
    assert "1 held back" in table
