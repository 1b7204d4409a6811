"""Screening: what passes is finite, sized, based, clipped and capped; all else is refused with one word."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_server.screening import (
    Expected,
    Refusal,
    Screened,
    norm_bound,
    norm_median,
    screen_evaluation,
    screen_update,
)
from wire.codec import encode
from wire.messages import Evaluation, Update
from wire.norm import l2_norm

P = 300
BASE = bytes(range(32))
EXPECTED = Expected(
    device="d1",
    kind="train",
    run="spring",
    round_number=4,
    base_sha256=BASE,
    graphs_sha256=bytes(32),
    params_size=P,
    buffers_size=2,
    max_examples=100,
    clipping_norm=5.0,
    codecs=frozenset({"fp32", "int8"}),
)
VECTOR = np.random.default_rng(1).normal(0, 0.1, P).astype(np.float32)


def update(vector: np.ndarray[Any, Any] = VECTOR, **changes: Any) -> Update:
    values: dict[str, Any] = {
        "update_id": bytes(16),
        "order_id": bytes(16),
        "run": "spring",
        "round_number": 4,
        "base_sha256": BASE,
        "num_examples": 40,
        "codec": "fp32",
        "params_size": P,
        "payload": encode(vector, "fp32", np.random.default_rng(0)),
        "buffers": np.array([1.0, 2.0], "<f2").tobytes(),
        "metrics": {"loss_last": 0.5},
    }
    return Update(**{**values, **changes})


def evaluation(**changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "update_id": bytes(16),
        "order_id": bytes(16),
        "run": "spring",
        "round_number": 4,
        "base_sha256": BASE,
        "num_examples": 40,
        "metrics": {"accuracy": 0.5},
    }
    return Evaluation(**{**values, **changes})


def raw_fp32(vector: np.ndarray[Any, Any]) -> bytes:
    """An fp32 payload that the encoder would refuse to make."""
    header = encode(np.zeros(len(vector), np.float32), "fp32", np.random.default_rng(0))[: -4 * len(vector)]
    return header + vector.astype("<f4").tobytes()


def spoiled(value: float) -> np.ndarray[Any, Any]:
    vector = VECTOR.copy()
    vector[7] = value
    return vector


def test_a_sound_update_passes_as_it_is() -> None:
    screened = screen_update(update(), "d1", EXPECTED)
    assert isinstance(screened, Screened)
    np.testing.assert_array_equal(screened.update, VECTOR)
    assert screened.buffers.tolist() == [1.0, 2.0]
    assert screened.num_examples == 40
    assert screened.norm == pytest.approx(float(np.linalg.norm(VECTOR)))


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"payload": raw_fp32(spoiled(math.nan))}, Refusal.NOT_DECODABLE),
        ({"payload": raw_fp32(spoiled(math.inf))}, Refusal.NOT_DECODABLE),
        ({"payload": b""}, Refusal.NOT_DECODABLE),
        ({"payload": encode(VECTOR[:-1], "fp32", np.random.default_rng(0))}, Refusal.NOT_DECODABLE),
        ({"payload": encode(VECTOR, "int8", np.random.default_rng(0))}, Refusal.NOT_DECODABLE),
        ({"params_size": P - 1}, Refusal.WRONG_SIZE),
        ({"buffers": b""}, Refusal.WRONG_SIZE),
        ({"buffers": struct.pack("<2e", 1.0, math.inf)}, Refusal.NOT_FINITE),
        ({"metrics": {"loss": math.nan}}, Refusal.NOT_FINITE),
        ({"codec": "int4"}, Refusal.WRONG_CODEC),
        ({"base_sha256": bytes(32)}, Refusal.WRONG_BASE),
        ({"round_number": 3}, Refusal.WRONG_ROUND),
        ({"run": "autumn"}, Refusal.WRONG_ROUND),
    ],
)
def test_an_unsound_update_is_refused(changes: dict[str, Any], refusal: Refusal) -> None:
    assert screen_update(update(**changes), "d1", EXPECTED) is refusal


def test_an_update_for_another_devices_order_is_refused() -> None:
    assert screen_update(update(), "d2", EXPECTED) is Refusal.FOREIGN_ORDER


def test_an_update_for_an_evaluate_order_is_refused() -> None:
    assert screen_update(update(), "d1", replace(EXPECTED, kind="evaluate")) is Refusal.WRONG_KIND


def test_num_examples_are_capped() -> None:
    screened = screen_update(update(num_examples=2**31), "d1", EXPECTED)
    assert isinstance(screened, Screened)
    assert screened.num_examples == 100


@pytest.mark.parametrize("factor", [100.0, 1e30])
def test_a_long_update_is_clipped_and_keeps_its_direction(factor: float) -> None:
    screened = screen_update(update(VECTOR * np.float32(factor)), "d1", EXPECTED)
    assert isinstance(screened, Screened)
    assert l2_norm(screened.update) == pytest.approx(5.0, rel=1e-6)
    assert screened.norm > 5.0
    cosine = float(screened.update @ VECTOR) / (5.0 * float(np.linalg.norm(VECTOR)))
    assert cosine == pytest.approx(1.0, abs=1e-6)


def test_the_longest_update_that_float32_holds_is_clipped_too() -> None:
    longest = np.full(P, np.finfo(np.float32).max, np.float32)
    screened = screen_update(update(longest), "d1", EXPECTED)
    assert isinstance(screened, Screened)
    assert l2_norm(screened.update) == pytest.approx(5.0, rel=1e-5)


@pytest.mark.parametrize(
    ("metrics", "refusal"),
    [
        ({}, Refusal.MISSING_METRIC),
        ({"loss_last": -0.1}, Refusal.IMPLAUSIBLE),
        ({"loss_last": 0.1, "other": -1e13}, Refusal.IMPLAUSIBLE),
        ({"loss_last": 0.1, "accuracy": 1.01}, Refusal.IMPLAUSIBLE),
        ({"loss_last": math.inf}, Refusal.NOT_FINITE),
    ],
)
def test_metrics_that_would_end_a_strategy_are_refused(metrics: dict[str, float], refusal: Refusal) -> None:
    expected = replace(EXPECTED, metrics=frozenset({"loss_last"}), shares=frozenset({"accuracy"}))
    assert screen_update(update(metrics=metrics), "d1", expected) is refusal
    evaluated = replace(expected, kind="evaluate")
    assert screen_evaluation(evaluation(metrics=metrics), "d1", evaluated) is refusal


def test_variance_below_zero_is_refused() -> None:
    expected = replace(EXPECTED, variances=((1, 2),))
    assert isinstance(screen_update(update(), "d1", expected), Screened)
    spoiled_buffers = np.array([-1.0, -2.0], "<f2").tobytes()
    assert screen_update(update(buffers=spoiled_buffers), "d1", expected) is Refusal.IMPLAUSIBLE


# ---- the running median ------------------------------------------------------------------------------------


def test_norm_of_a_round_is_its_median_and_zeros_say_nothing() -> None:
    assert norm_median([]) == 0.0
    assert norm_median([0.0, 0.0]) == 0.0
    assert norm_median([1.0, 0.0, 3.0, 2.0, 0.0]) == 2.0
    assert norm_median([1.0, 1e30]) == 1.0


def test_bound_is_a_factor_of_the_running_median_once_there_is_one() -> None:
    assert norm_bound([], factor=3.0) == math.inf
    assert norm_bound([0.0], factor=3.0) == math.inf
    assert norm_bound([2.0, 1.0, 1e30], factor=3.0) == 6.0
    assert norm_bound([2.0], factor=0.0) == math.inf


@given(st.lists(st.floats(0.5, 2.0), min_size=4, max_size=20), st.floats(1e-9, 1e30), st.integers(0, 10))
def test_a_minority_moves_the_median_no_further_than_honest_norms_lie(
    honest: list[float], lie: float, liars: int
) -> None:
    liars = min(liars, (len(honest) - 1) // 2)
    assert min(honest) <= norm_median([*honest, *[lie] * liars]) <= max(honest)


def test_an_update_of_zeros_passes() -> None:
    screened = screen_update(update(np.zeros(P, np.float32)), "d1", EXPECTED)
    assert isinstance(screened, Screened)
    assert screened.norm == 0.0


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2000), st.sampled_from(["fp32", "int8"]), st.binary(min_size=4, max_size=4))
def test_any_payload_gives_a_sound_update_or_a_refusal(payload: bytes, codec: Any, buffers: bytes) -> None:
    outcome = screen_update(update(payload=payload, codec=codec, buffers=buffers), "d1", EXPECTED)
    if isinstance(outcome, Screened):
        assert np.isfinite(outcome.update).all()
        assert l2_norm(outcome.update) <= 5.0 * (1 + 1e-6)
    else:
        assert outcome in Refusal


def test_a_sound_evaluation_gives_its_capped_weight() -> None:
    expected = replace(EXPECTED, kind="evaluate")
    assert screen_evaluation(evaluation(), "d1", expected) == 40
    assert screen_evaluation(evaluation(num_examples=10**6), "d1", expected) == 100


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"metrics": {"accuracy": math.nan}}, Refusal.NOT_FINITE),
        ({"base_sha256": bytes(32)}, Refusal.WRONG_BASE),
        ({"round_number": 5}, Refusal.WRONG_ROUND),
    ],
)
def test_an_unsound_evaluation_is_refused(changes: dict[str, Any], refusal: Refusal) -> None:
    expected = replace(EXPECTED, kind="evaluate")
    assert screen_evaluation(evaluation(**changes), "d1", expected) is refusal


def test_an_evaluation_for_a_train_order_is_refused() -> None:
    assert screen_evaluation(evaluation(), "d1", EXPECTED) is Refusal.WRONG_KIND


def test_every_refusal_fits_a_receipt() -> None:
    for refusal in Refusal:
        assert msgspec.convert(str(refusal), str) == refusal.value
        assert len(refusal) <= 64
