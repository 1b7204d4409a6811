"""The gate: a better model is released, any other is held with a reason."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cloud_server.influence import capped_weights
from cloud_server.release.gate import GatePolicy, HoldReason, Judged, Pair, judge
from wire.errors import ConfigurationError

CURRENT = Judged(federated=0.70, federated_examples=500, operator=0.80, size_bytes=30_000)
BETTER = Judged(federated=0.75, federated_examples=500, operator=0.80, size_bytes=30_000)
POLICY = GatePolicy(min_gain=0.01, max_operator_drop=0.02, max_bytes=40_000, min_examples=100)


def test_a_better_model_is_released() -> None:
    verdict = judge(BETTER, CURRENT, POLICY, higher_is_better=True)
    assert verdict.is_released
    assert verdict.gain == pytest.approx(0.05)


def test_the_first_sound_model_is_released() -> None:
    assert judge(BETTER, None, POLICY, higher_is_better=True).is_released


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"federated": 0.60}, HoldReason.NO_GAIN),
        ({"federated": 0.70}, HoldReason.NO_GAIN),
        ({"federated": 0.705}, HoldReason.NO_GAIN),
        ({"operator": 0.77}, HoldReason.OPERATOR_WORSE),
        ({"federated": math.nan}, HoldReason.NOT_FINITE),
        ({"operator": math.inf}, HoldReason.NOT_FINITE),
        ({"size_bytes": 40_001}, HoldReason.TOO_LARGE),
        ({"federated_examples": 99}, HoldReason.TOO_FEW_EXAMPLES),
        ({"federated": None, "operator": None}, HoldReason.NO_EVIDENCE),
        ({"federated": None, "operator": 0.80}, HoldReason.NO_GAIN),
    ],
)
def test_any_other_model_is_held_with_its_reason(changes: dict[str, float], reason: HoldReason) -> None:
    verdict = judge(replace(BETTER, **changes), CURRENT, POLICY, higher_is_better=True)  # type: ignore[arg-type]
    assert verdict.reason is reason


def test_an_equal_model_is_held_even_without_a_least_gain() -> None:
    verdict = judge(CURRENT, CURRENT, GatePolicy(), higher_is_better=True)
    assert verdict.reason is HoldReason.NO_GAIN


def test_an_anomaly_score_is_better_when_it_is_lower() -> None:
    lower = replace(CURRENT, federated=0.60, operator=0.75)
    assert judge(lower, CURRENT, POLICY, higher_is_better=False).is_released
    higher = judge(BETTER, CURRENT, POLICY, higher_is_better=False)
    assert higher.reason is HoldReason.NO_GAIN


def test_an_anomaly_score_that_rises_on_the_operators_data_is_held() -> None:
    candidate = replace(CURRENT, federated=0.60, operator=0.83)
    verdict = judge(candidate, CURRENT, POLICY, higher_is_better=False)
    assert verdict.reason is HoldReason.OPERATOR_WORSE


def test_the_operators_metric_decides_where_the_fleet_measured_nothing() -> None:
    candidate = replace(BETTER, federated=None, federated_examples=0, operator=0.85)
    verdict = judge(candidate, CURRENT, POLICY, higher_is_better=True)
    assert verdict.is_released
    assert verdict.gain == pytest.approx(0.05)


def test_metrics_that_cannot_be_compared_are_no_evidence() -> None:
    candidate = replace(BETTER, operator=None)
    verdict = judge(candidate, replace(CURRENT, federated=None), POLICY, higher_is_better=True)
    assert verdict.reason is HoldReason.NO_EVIDENCE


@pytest.mark.parametrize("name", ["min_gain", "max_operator_drop", "max_bytes", "min_examples"])
def test_a_policy_below_zero_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        GatePolicy(**{name: -1})
    assert caught.value.facts["name"] == name


# ---- one device among others -------------------------------------------------------------------------------


def pairs(gains: list[float], weights: list[int] | None = None) -> list[Pair]:
    capped = capped_weights(weights or [40] * len(gains))
    return [Pair(0.7 + gain, 0.7, weight) for gain, weight in zip(gains, capped, strict=True)]


def test_gain_of_the_devices_is_that_of_their_pairs() -> None:
    verdict = judge(
        BETTER, CURRENT, POLICY, higher_is_better=True, pairs=pairs([0.04, 0.05, 0.06, 0.05, 0.05])
    )
    assert verdict.is_released
    assert verdict.gain == pytest.approx(0.05)


@pytest.mark.parametrize("claimed", [1, 40, 2**31])
@pytest.mark.parametrize("lie", [-1.0, -1e12])
def test_one_liar_cannot_hold_a_better_model_back(lie: float, claimed: int) -> None:
    said = pairs([0.05, 0.05, 0.04, 0.06, lie], [40, 40, 40, 40, claimed])
    assert judge(BETTER, CURRENT, POLICY, higher_is_better=True, pairs=said).is_released


@pytest.mark.parametrize("claimed", [1, 40, 2**31])
@pytest.mark.parametrize("lie", [1.0, 1e12])
def test_one_liar_cannot_push_a_worse_model(lie: float, claimed: int) -> None:
    said = pairs([-0.05, -0.05, -0.04, -0.06, lie], [40, 40, 40, 40, claimed])
    verdict = judge(BETTER, CURRENT, POLICY, higher_is_better=True, pairs=said)
    assert verdict.reason is HoldReason.NO_GAIN


@pytest.mark.parametrize("liars", [1, 2])
def test_a_fifth_of_the_devices_cannot_either(liars: int) -> None:
    honest = [-0.02] * (10 - liars)
    verdict = judge(BETTER, CURRENT, POLICY, higher_is_better=True, pairs=pairs([*honest, *[1.0] * liars]))
    assert verdict.reason is HoldReason.NO_GAIN


def test_pairs_of_an_anomaly_task_are_better_when_they_are_lower() -> None:
    lower = replace(CURRENT, federated=0.6, operator=0.75)
    assert judge(lower, CURRENT, POLICY, higher_is_better=False, pairs=pairs([-0.05] * 3)).is_released


def test_device_that_leaves_a_metric_out_does_not_silence_the_others() -> None:
    """The weighted mean of Flower drops a metric that one reply lacks; pairs do not."""
    candidate, current = replace(BETTER, federated=None), replace(CURRENT, federated=None)
    assert judge(candidate, current, POLICY, higher_is_better=True, pairs=pairs([0.05] * 3)).is_released
