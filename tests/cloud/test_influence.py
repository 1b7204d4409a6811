"""One device counts for one device, whatever it says of itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_server.influence import (
    MAX_REQUESTS_PER_SECOND,
    MAX_VOTES_PER_SECOND,
    WINDOW_SECONDS,
    ReportBounds,
    capped_weights,
    trimmed_mean,
)
from wire.messages import InferenceReport

finite = st.floats(-1e6, 1e6)
weight = st.integers(1, 2**31)


@pytest.mark.parametrize(
    ("weights", "capped"),
    [
        ([], []),
        ([7], [7]),
        ([10, 2**31], [10, 40]),
        ([20, 30, 40, 2**31], [20, 30, 40, 120]),
        ([1, 1, 1, 100], [1, 1, 1, 4]),
    ],
)
def test_no_weight_is_more_than_a_few_of_the_median(weights: list[int], capped: list[int]) -> None:
    assert capped_weights(weights) == capped


@pytest.mark.parametrize(
    ("values", "weights", "mean"),
    [
        ([0.5], [9], 0.5),
        ([0.0, 1.0], [1, 3], 0.75),
        ([0.0, 0.1, 1e9], [1, 1, 1], 0.1),
        ([0.0, 0.1, 0.3, 1e9], [1, 1, 1, 1], 0.2),
        ([0.0, 0.1, 1e9], [1, 1, 2**31], 0.1),
        ([-1e9, 0.1, 0.2, 0.3, 0.4], [1] * 5, 0.2),
        ([0.0] * 4 + [1.0] + [1e9], [5] * 6, 4 / 18),
    ],
)
def test_trimmed_mean_leaves_out_what_lies_outside(
    values: list[float], weights: list[int], mean: float
) -> None:
    assert trimmed_mean(values, weights) == pytest.approx(mean)


@given(
    st.lists(st.tuples(finite, st.integers(1, 1000)), min_size=2, max_size=12), finite, st.integers(1, 10**6)
)
def test_one_liar_moves_the_mean_no_further_than_the_others_lie(
    honest: list[tuple[float, int]], lie: float, claimed: int
) -> None:
    values = [value for value, _ in honest]
    weights = [count for _, count in honest]
    mean = trimmed_mean([*values, lie], [*weights, claimed])
    slack = 1e-6 * (1.0 + max(map(abs, values)))
    assert min(values) - slack <= mean <= max(values) + slack


def report(requests: int = 0, right: int = 0, judged: int = 0, errors: int = 0) -> InferenceReport:
    return InferenceReport(
        release_version=1,
        requests=requests,
        errors=errors,
        latency_p50_seconds=0.001,
        latency_p99_seconds=0.002,
        confidence_mean=0.9,
        feedback_correct=right,
        feedback_total=judged,
    )


def test_honest_reports_count_as_they_are() -> None:
    bounds = ReportBounds(0.0)
    for number in range(20):
        honest = report(requests=50 * 300, right=8, judged=10, errors=3)
        assert bounds.counted("camera", honest, 300.0 * number) == honest


def test_absurd_report_counts_for_what_a_device_can_have_done() -> None:
    bounds = ReportBounds(0.0)
    counted = [bounds.counted("liar", report(2**53, 0, 2**53, 2**52), 1.0) for _ in range(3)]
    assert sum(each.requests for each in counted) == MAX_REQUESTS_PER_SECOND * WINDOW_SECONDS
    assert sum(each.feedback_total for each in counted) == MAX_VOTES_PER_SECOND * WINDOW_SECONDS
    assert counted[0].errors == counted[0].requests // 2
    assert all(each.feedback_correct == 0 for each in counted)


def test_votes_of_one_device_are_bounded_by_those_of_the_others() -> None:
    """Ten devices judge four answers each; one says that it judged thousands, all wrong."""
    bounds = ReportBounds(0.0)
    right = judged = 0
    for window in range(1, 4):
        now = window * WINDOW_SECONDS
        for number in range(10):
            counted = bounds.counted(f"d{number}", report(right=4, judged=4), now)
            right, judged = right + counted.feedback_correct, judged + counted.feedback_total
            lie = bounds.counted("liar", report(right=0, judged=1000), now)
            if window > 1:
                judged += lie.feedback_total
    assert right == 120
    # Ten median devices at most in each window, where unbounded it would have been ten thousand.
    assert judged == 120 + 2 * 40
