"""Our robust strategies: by name, in our driver and in a stock loop the same, unmoved by a minority and by what cannot
be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from cloud_server.aggregate.clipped_mean import Rows, shares_of
from cloud_server.aggregate.coordinate import coordinate_median, trimmed_mean
from cloud_server.aggregate.geometric_median import geometric_median
from cloud_server.aggregate.krum import multi_krum
from cloud_server.db import schema
from cloud_server.flower.cohort import flat, like
from cloud_server.flower.driver import StrategyDriver
from cloud_server.flower.planning import PlanningGrid, seeded
from cloud_server.flower.private import set_identity
from cloud_server.flower.robust import ROBUST, ClippedMean, FLTrust, RobustStrategy
from cloud_server.flower.strategies import build_strategy
from cloud_server.influence import capped_weights
from cloud_server.rounds.ports import Reply
from cloud_server.rounds.runner import RoundRunner
from tests.cloud.round_lab import SHAPES, Lab, make_slots
from tests.cloud.test_strategies import NODES, Replies, checkpoint, vectors
from wire.checkpoint import Checkpoint
from wire.errors import ConfigurationError, RoundError
from wire.norm import l2_norm

SLOTS = make_slots(SHAPES)
P = sum(slot.size for slot in SLOTS)
NAMES = sorted(ROBUST)
TRUSTED = np.random.default_rng(5).normal(0.1, 0.05, P).astype(np.float32)


def trust(base: Checkpoint, seed: int) -> NDArray[np.float32]:
    """As if the operator's samples had moved the base so."""
    return base.params + TRUSTED


def driver(name: str, parameters: dict[str, Any] | None = None, buffers: int = 0) -> StrategyDriver:
    return StrategyDriver(
        build_strategy(name, parameters),
        SLOTS,
        buffers_size=buffers,
        reference=trust if name == "FLTrust" else None,
    )


def aggregate(name: str, updates: Sequence[NDArray[np.float32]], seed: int = 1) -> NDArray[np.float64]:
    """The update that a strategy makes of these."""
    base = checkpoint()
    result = driver(name).aggregate_train(1, base, Many(updates), seed)
    return result.params.astype(np.float64) - base.params


class Many(Replies):
    """Any number of replies of equal weight."""

    def _reply(self, i: int, vector: NDArray[np.float32]) -> Reply:
        norm = l2_norm(vector)
        return Reply(
            i + 1, 10, {"loss_first": 1.0}, vector.copy(), np.full(self._buffers, 1.0 + i, np.float32), norm
        )


# ---- by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_robust_strategy_is_built_with_flowers_own_parameters(name: str) -> None:
    strategy: Any = build_strategy(name, {"fraction_train": 0.5})
    assert type(strategy) is ROBUST[name]
    assert (strategy.fraction_train, strategy.min_train_nodes) == (0.5, 1)


@pytest.mark.parametrize(
    ("name", "parameters", "hint"),
    [
        ("ClippedMeen", {}, "ClippedMean"),
        ("RobustMultiKrumm", {}, "RobustMultiKrum"),
        ("ClippedMean", {"max_weight_ratio": 0.5}, "from 1"),
        ("ClippedMean", {"max_weight": 2.0}, "max_weight_ratio"),
        ("ClippedMean", {"trimmed_share": 0.5}, "0.5"),
        ("TrimmedMean", {"trimmed_share": 0.5}, "0.5"),
        ("TrimmedMean", {"trimmed_share": "much"}, "float"),
        ("RobustMultiKrum", {"attacker_share": 0.6}, "0.5"),
        ("FLTrust", {"train_reference": "me"}, "min_train_nodes"),
    ],
)
def test_wrong_parameter_of_a_robust_strategy_is_an_error_with_a_hint(
    name: str, parameters: dict[str, Any], hint: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        build_strategy(name, parameters)
    assert hint in caught.value.hint


def test_fltrust_without_samples_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="clean labelled samples") as caught:
        StrategyDriver(build_strategy("FLTrust"), SLOTS)
    assert "refine.data" in caught.value.hint


# ---- the clipped mean --------------------------------------------------------------------------------------


def test_clipped_mean_is_the_mean_of_cut_updates_with_capped_weights() -> None:
    """Of updates at right angles, which say nothing of each other; its length is that of a cut to two medians."""
    updates = [np.eye(P, dtype=np.float32)[i] * np.float32(1.0 + i) for i in range(11)]
    weights = np.array(capped_weights([10 + 3 * i for i in range(11)], 1.2))
    lengths = np.array([l2_norm(update) for update in updates])
    cut, roomy = np.minimum(lengths, 6.0), np.minimum(lengths, 12.0)
    expected = np.zeros(P)
    expected[:11] = weights * cut / weights.sum() * (weights @ roomy) / (weights @ cut)
    base = checkpoint()
    subject = driver("ClippedMean", {"max_weight_ratio": 1.2, "trimmed_share": 0.0})
    found = subject.aggregate_train(1, base, Replies(updates), 1)
    np.testing.assert_allclose(found.params - base.params, expected, rtol=0, atol=1e-5)


def test_clipped_mean_holds_one_reply_at_a_time() -> None:
    replies = Replies(vectors(1))
    driver("ClippedMean").aggregate_train(1, checkpoint(), replies, 1)
    assert replies.most_alive <= 2
    assert replies.passes == 3


def test_device_that_claims_many_examples_counts_for_few_of_the_others() -> None:
    assert capped_weights([10, 10, 10, 10**15], 4.0) == [10, 10, 10, 40]
    assert capped_weights([], 4.0) == []
    assert capped_weights([1, 1], 1.0) == [1, 1]
    assert capped_weights([10, 10**15], 4.0) == [10, 40]  # of two the louder one may lie


def test_stored_replies_tell_their_lengths_and_stay_decoded() -> None:
    """Through the real books: a run under the clipped mean is that of the plain mean where nobody is long."""
    lab = Lab(4, strategy="ClippedMean", parameters={"max_weight_ratio": 100.0}, rounds=1)
    target = np.full(P, 0.1, np.float32)
    for device in lab.devices.values():
        device.local_update = lambda order: target  # type: ignore[method-assign]
    head = lab.run()
    plain = Lab(4, strategy="FedAvg", rounds=1)
    for device in plain.devices.values():
        device.local_update = lambda order: target  # type: ignore[method-assign]
    np.testing.assert_allclose(head.params, plain.run().params, atol=2e-3)


# ---- the same everywhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_driver_gives_what_the_rule_gives(name: str) -> None:
    updates = vectors(2)
    matrix = torch.from_numpy(np.stack(updates))
    expected = {
        "ClippedMean": lambda: torch.from_numpy(_clipped(updates, None)),
        "GeometricMedian": lambda: geometric_median(matrix),
        "CoordinateMedian": lambda: coordinate_median(matrix),
        "TrimmedMean": lambda: trimmed_mean(matrix, 0.2),
        "RobustMultiKrum": lambda: multi_krum(matrix, 3),  # 0.2 of 11 is 2.2
        "FLTrust": lambda: torch.from_numpy(_clipped(updates, TRUSTED)),
    }[name]()
    np.testing.assert_allclose(aggregate(name, updates), expected.numpy(), rtol=1e-4, atol=1e-6)


def _clipped(
    updates: Sequence[NDArray[np.float32]], reference: NDArray[np.float32] | None
) -> NDArray[np.float64]:
    shares = shares_of(
        [torch.from_numpy(update).double() for update in updates],
        [l2_norm(update) for update in updates],
        [10] * len(updates),
        way=None,
        standings=[0.0] * len(updates),
        seed=1,
        reference=None if reference is None else torch.from_numpy(reference).double(),
    )
    rows = Rows(shares, P, 0)
    for number, update in enumerate(updates):
        rows.add(number, update)
    return rows.step(0.0)


@pytest.mark.parametrize("name", NAMES)
def test_stock_loop_gives_what_our_driver_gives(name: str) -> None:
    strategy = stock(name)
    messages = plan(strategy, 3)
    assert [message.metadata.dst_node_id for message in messages] == NODES
    arrays, metrics = aggregate_stock(strategy, [reply(each) for each in vectors(3)])
    assert arrays is not None
    assert metrics is not None
    found = flat(arrays) - checkpoint().params
    np.testing.assert_allclose(found, aggregate(name, vectors(3)), rtol=0, atol=2e-6)
    assert float(metrics["loss_first"]) == pytest.approx(1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_replies_that_cannot_be_used_are_left_out_of_a_stock_round(name: str) -> None:
    good = [reply(each) for each in vectors(4)]
    first, subject = stock(name), stock(name)
    plan(first, 4)
    plan(subject, 4)
    expected, _ = aggregate_stock(first, good)
    found, _ = aggregate_stock(subject, iter([*unusable(), *good]))
    assert expected is not None
    assert found is not None
    np.testing.assert_array_equal(flat(found), flat(expected))
    assert aggregate_stock(subject, unusable()) == (None, None)
    assert aggregate_stock(subject, []) == (None, None)


def test_integer_arrays_keep_their_type() -> None:
    record = ArrayRecord({"w": Array(np.ones(2, np.float64)), "count": Array(np.array(5, np.int64))})
    made = like(record, np.array([0.5, 0.25, 6.6]))
    assert (made["w"].numpy().dtype, made["count"].numpy()) == (np.float64, 7)


def test_stock_round_without_a_base_is_a_round_error() -> None:
    with pytest.raises(RoundError, match="configure_train"):
        ClippedMean().aggregate_train(1, [reply(vectors(1)[0])])


def stock(name: str) -> RobustStrategy:
    """As a user's ServerApp makes it."""
    set_identity()
    if name == "FLTrust":
        return FLTrust(train_reference=lambda arrays: like(arrays, flat(arrays) + TRUSTED))
    return ROBUST[name]()


def plan(strategy: RobustStrategy, seed: int) -> list[Message]:
    with seeded(seed):
        grid = PlanningGrid(NODES)
        return sorted(
            strategy.configure_train(1, record_of(checkpoint().params), ConfigRecord(), grid),
            key=lambda message: message.metadata.dst_node_id,
        )


def aggregate_stock(strategy: RobustStrategy, replies: Any) -> tuple[ArrayRecord | None, MetricRecord | None]:
    with seeded(1):
        return strategy.aggregate_train(1, replies)


def record_of(vector: NDArray[Any], **changes: NDArray[Any]) -> ArrayRecord:
    parts = {s.name: vector[s.offset : s.offset + s.size].reshape(s.shape) for s in SLOTS}
    return ArrayRecord({name: Array(np.array(values)) for name, values in {**parts, **changes}.items()})


def reply(update: NDArray[np.float32], *, weight: Any = 10, arrays: ArrayRecord | None = None) -> Message:
    record = record_of(checkpoint().params + update) if arrays is None else arrays
    metrics = MetricRecord(
        {"loss_first": 1.0} if weight is None else {"num-examples": weight, "loss_first": 1.0}
    )
    instruction = Message(RecordDict(), dst_node_id=NODES[0], message_type="train")
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=instruction)


def unusable() -> list[Message]:
    fine = vectors(9)[0]
    lone = ArrayRecord({"first.bias": Array(np.zeros(6, np.float32))})
    asked = Message(RecordDict(), dst_node_id=NODES[0], message_type="train")
    return [
        Message(Error(code=1, reason="gone"), reply_to=asked),
        *(reply(np.full(P, value, np.float32)) for value in (np.nan, np.inf)),
        *(reply(fine, weight=weight) for weight in (0, -5, float("nan"), float("inf"), None)),
        reply(fine, arrays=record_of(np.full(P, 1e300))),
        reply(fine, arrays=lone),
        reply(fine, arrays=record_of(fine, scale=np.zeros(3, np.float32))),
    ]


# ---- what a minority can do --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attack", [-1.0, -100.0, 1e15])
def test_a_fifth_of_false_replies_leaves_the_direction(name: str, attack: float) -> None:
    rng = np.random.default_rng(3)
    honest = [(TRUSTED + 0.02 * rng.normal(0, 1, P)).astype(np.float32) for _ in range(12)]
    false = [
        np.float32(attack) * each if attack < 0 else np.full(P, attack, np.float32) for each in honest[:3]
    ]
    found = aggregate(name, [*honest, *false])
    cosine = found @ TRUSTED / (np.linalg.norm(found) * np.linalg.norm(TRUSTED))
    assert cosine > 0.9
    assert np.linalg.norm(found) < 1.5 * np.linalg.norm(TRUSTED)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"ClippedMean", "FLTrust"}))
def test_buckets_of_a_large_cohort_follow_from_the_seed(name: str) -> None:
    updates = [each.astype(np.float32) for each in np.random.default_rng(2).normal(0.1, 0.2, (70, P))]
    first, again, other = (aggregate(name, updates, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("name", NAMES)
def test_buffers_are_the_median_under_a_robust_strategy(name: str) -> None:
    result = driver(name, buffers=2).aggregate_train(1, checkpoint(buffers=2), Many(vectors(1), buffers=2), 1)
    np.testing.assert_allclose(result.buffers, 6.0, rtol=1e-6)


# ---- the bound on held-out data ----------------------------------------------------------------------------


class Distance:
    """Held-out data on which a head does the worse, the further it lies from the start."""

    def loss_of(self, base: Checkpoint, head: Checkpoint) -> float:
        return l2_norm(head.params - base.params)


@pytest.mark.parametrize(("limit", "state"), [(0.5, "failed"), (1e6, "done")])
def test_head_that_is_too_bad_on_held_out_data_fails_the_round(limit: float, state: str) -> None:
    def make_runner(plan: Any, ports: Any) -> RoundRunner:
        return RoundRunner(replace(plan, max_holdout_drop=limit), replace(ports, held_out=Distance()))

    lab = Lab(3, rounds=1, make_runner=make_runner)
    for _ in range(20):
        lab.step()
    first = lab.rows(schema.rounds)[0]
    assert first.state == state
    assert ("on held-out data" in first.reason) == (state == "failed")
    assert (lab.runner.head.sha256 == lab.initial.sha256) == (state == "failed")
