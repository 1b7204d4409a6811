"""The report's figures and its page."""

from __future__ import annotations

import json
from dataclasses import replace

from cloud_server.release.gate import HoldReason
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
        "releases": (ReleaseRow(1, 0, 0.6, 0.61), ReleaseRow(2, 2, 0.85, 0.86)),
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
    assert page.count("<svg role=") == 2
    assert "not enough better" in page
    assert "http" not in page.split("<body>")[1].split("<svg")[0]


def test_page_states_units_and_what_was_measured() -> None:
    page = render_page(report())
    for words in (
        "on 40 later samples",
        "updates, kB",
        "+25.0 points",
        "int8 against float32, points",
        "<td>-1.0</td>",
    ):
        assert words in page, words
    assert "seconds" in page
    untimed = tuple(replace(row, seconds=None) for row in report().rounds)
    assert "seconds" not in render_page(report(rounds=untimed, swaps=()))


def test_page_of_many_devices_draws_their_distribution() -> None:
    device = report().devices[0]
    many = tuple(replace(device, device=f"device-{number}") for number in range(100))
    page = render_page(report(devices=many))
    assert "distribution of the gains of 100 devices" in page
    assert page.count("<td>device-") == 100


def test_report_of_an_anomaly_score_gains_when_the_error_falls() -> None:
    device = replace(report().devices[0], first=0.5, last=0.25)
    releases = (ReleaseRow(1, 0, 0.5, 0.5, {"noise": 0.6}), ReleaseRow(2, 2, 0.25, 0.24, {"noise": 0.9}))
    error = report(metric="mse", higher_is_better=False, devices=(device,), releases=releases)
    assert error.gain() == 0.25
    assert error.summary()["mse_first"] == 0.5
    assert error.summary()["release_rows"][1]["separation"] == {"noise": 0.9}
    assert "accuracy" not in error.to_json()
    assert "accuracy" not in render_page(error)
    page = render_page(error)
    assert "lower is better" in page
    assert "AUC: noise" in page
    assert "+0.2500" in page
    assert "AUC, noise: 0.900" in render_table(error)


def test_page_has_words_for_every_reason_of_the_gate() -> None:
    for reason in HoldReason:
        rounds = (RoundRow(1, "done", 2, 0.4, f"held: {reason}", 2.0),)
        row = render_page(report(rounds=rounds)).split("<h2>Held back</h2>")[1].split("</table>")[0]
        assert f"<td class='text'>{reason}</td>" in row
        assert "<td class='text'></td>" not in row


def test_table_lists_every_hold_back_with_its_reason() -> None:
    assert "held back: 1 (no_gain)" in render_table(report())


def test_page_is_the_same_for_the_same_report() -> None:
    assert render_page(report()) == render_page(report())


def test_table_ends_with_the_totals() -> None:
    table = render_table(report())
    assert "a-left" in table
    assert "0.600    0.850   +0.250" in table
    assert "1 held back" in table
