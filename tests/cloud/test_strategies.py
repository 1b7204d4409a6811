"""Flower's strategies behind our port: by name, fed exactly, their state taken out and put back."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from cloud_server.flower import strategies as named
from cloud_server.flower.driver import ReplyStream, StrategyDriver
from cloud_server.flower.planning import PlanningGrid, seeded
from cloud_server.flower.private import set_identity
from cloud_server.flower.records import to_record, to_vector
from cloud_server.flower.state import export_state
from cloud_server.flower.strategies import build_strategy, is_folded
from cloud_server.rounds.ports import Measured, Reply
from tests.cloud.round_lab import SHAPES, make_slots
from wire.checkpoint import Checkpoint
from wire.errors import ConfigurationError, QuorumError, RoundError, StorageError

SLOTS = make_slots(SHAPES)
P = sum(slot.size for slot in SLOTS)
NODES = [1000 + i for i in range(11)]

DIRECT: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.7},
    "FedProx": {"proximal_mu": 0.1},
    "FedAdam": {},
    "FedYogi": {},
    "FedAdagrad": {},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 2},
    "MultiKrum": {"num_malicious_nodes": 2, "num_nodes_to_select": 5},
    "Bulyan": {"num_malicious_nodes": 2},
    "QFedAvg": {"client_learning_rate": 0.1},
}
PRIVATE: dict[str, dict[str, Any]] = {
    "DifferentialPrivacyServerSideFixedClipping": {
        "noise_multiplier": 0.1,
        "clipping_norm": 1.0,
        "num_sampled_clients": 11,
    },
    "DifferentialPrivacyServerSideAdaptiveClipping": {"noise_multiplier": 0.1, "num_sampled_clients": 11},
    "DifferentialPrivacyClientSideFixedClipping": {
        "noise_multiplier": 0.1,
        "clipping_norm": 1.0,
        "num_sampled_clients": 11,
    },
    "DifferentialPrivacyClientSideAdaptiveClipping": {"noise_multiplier": 0.1, "num_sampled_clients": 11},
}
ALL = {**DIRECT, **PRIVATE}


class Replies:
    """Replies of one round, made anew on each pass, as from the store."""

    def __init__(self, vectors: Sequence[NDArray[np.float32]], buffers: int = 0) -> None:
        self._vectors = vectors
        self._buffers = buffers
        self.passes = 0
        self.most_alive = 0
        self._made: list[weakref.ref[NDArray[np.float32]]] = []

    def __len__(self) -> int:
        return len(self._vectors)

    def __iter__(self) -> Iterator[Reply]:
        self.passes += 1
        for i, vector in enumerate(self._vectors):
            yield self._reply(i, vector)

    def _reply(self, i: int, vector: NDArray[np.float32]) -> Reply:
        update = vector.copy()
        self._made.append(weakref.ref(update))
        self.most_alive = max(self.most_alive, sum(made() is not None for made in self._made))
        return Reply(
            node_id=NODES[i],
            num_examples=10 + 3 * i,
            metrics={
                "loss_first": 1.0 + 0.1 * i,
                "loss_last": 0.5,
                "update_norm": float(np.linalg.norm(vector)),
            },
            update=update,
            buffers=np.full(self._buffers, 1.0 + i, np.float32),
            norm=float(np.linalg.norm(vector)),
        )


def vectors(round_number: int, count: int = 11) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(round_number)
    return [rng.normal(0.1, 0.2, P).astype(np.float32) for _ in range(count)]


def checkpoint(params: NDArray[np.float32] | None = None, buffers: int = 0) -> Checkpoint:
    start = np.random.default_rng(99).normal(0, 1, P).astype(np.float32) if params is None else params
    return Checkpoint(
        params=start, buffers=np.zeros(buffers, np.float32), ranges=np.zeros((0, 2), np.float32)
    )


def driver(name: str, parameters: dict[str, Any] | None = None) -> StrategyDriver:
    return StrategyDriver(build_strategy(name, ALL[name] if parameters is None else parameters), SLOTS)


def one_round(subject: StrategyDriver, number: int, base: Checkpoint) -> Checkpoint:
    subject.plan_train(number, base, NODES, number)
    return checkpoint(subject.aggregate_train(number, base, Replies(vectors(number)), number).params)


# ---- by name -----------------------------------------------------------------------------------------------


def test_every_strategy_of_flower_is_known_or_refused() -> None:
    import flwr.serverapp.strategy as flower

    ours = {*named.PLAIN, *named.WRAPPERS, *named.REFUSED}
    assert {name for name in flower.__all__ if name not in ("Strategy", "Result")} == ours


@pytest.mark.parametrize("name", named.REFUSED)
def test_xgboost_is_refused_with_a_hint(name: str) -> None:
    with pytest.raises(ConfigurationError, match="trees") as caught:
        build_strategy(name)
    assert "FedAvg" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "parameters", "hint"),
    [
        ("FedAvgg", {}, "FedAvg"),
        ("fedadam", {}, "FedAdam"),
        ("Zebra", {}, "FedMedian"),
        ("FedAdam", {"etaa": 0.1}, "eta"),
        ("FedAdam", {"train_metrics_aggr_fn": print}, "one of"),
        ("FedAdam", {"eta": "fast"}, "float"),
        ("FedAdam", {"eta": True}, "float"),
        ("FedAdam", {"eta": float("nan")}, "float"),
        ("Krum", {"num_malicious_nodes": 1.5}, "int"),
        ("FedTrimmedAvg", {"beta": 0.7}, "documentation"),
        ("QFedAvg", {}, "set"),
        ("DifferentialPrivacyServerSideFixedClipping", {"clipping_norm": 1.0}, "set"),
        ("DifferentialPrivacyServerSideFixedClipping", {"strategy": "FedAvg"}, "name ="),
    ],
)
def test_wrong_name_or_parameter_is_an_error_with_a_hint(
    name: str, parameters: dict[str, Any], hint: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        build_strategy(name, parameters)
    assert hint in caught.value.hint


def test_wrapper_takes_the_strategy_that_it_wraps() -> None:
    parameters = {
        **PRIVATE["DifferentialPrivacyServerSideFixedClipping"],
        "strategy": {"name": "FedAdam", "parameters": {"eta": 0.5}},
    }
    strategy: Any = build_strategy("DifferentialPrivacyServerSideFixedClipping", parameters)
    assert type(strategy.strategy).__name__ == "FedAdam"
    assert strategy.strategy.eta == 0.5


def test_wrapper_of_a_wrapper_is_refused() -> None:
    inner = {"name": "DifferentialPrivacyServerSideFixedClipping"}
    with pytest.raises(ConfigurationError, match="cannot wrap"):
        build_strategy(
            "DifferentialPrivacyServerSideFixedClipping",
            {**PRIVATE["DifferentialPrivacyServerSideFixedClipping"], "strategy": inner},
        )


# ---- aggregating -------------------------------------------------------------------------------------------


def test_only_exact_types_with_default_functions_are_folded() -> None:
    folded = {name for name in DIRECT if is_folded(build_strategy(name, DIRECT[name]))}
    assert folded == {"FedAvg", "FedAvgM", "FedProx", "FedAdam", "FedYogi", "FedAdagrad"}
    assert not any(is_folded(build_strategy(name, PRIVATE[name])) for name in PRIVATE)

    class Own(FedAvg):
        """A user's own strategy: whatever it does, it sees every reply."""

    assert not is_folded(Own())
    assert not is_folded(FedAvg(train_metrics_aggr_fn=lambda records, key: MetricRecord()))


@pytest.mark.parametrize("name", sorted(set(DIRECT) - {"QFedAvg"}))
def test_aggregate_is_flowers_own(name: str) -> None:
    """Two rounds, the second from the first's result, against the stock strategy with plain replies."""
    subject, stock = driver(name), build_strategy(name, DIRECT[name])
    base = checkpoint()
    for number in (1, 2):
        expected = stock_round(stock, number, base)
        base = one_round(subject, number, base)
        np.testing.assert_allclose(base.params, expected, rtol=0, atol=2e-7 * np.abs(expected).max())


def stock_round(stock: Any, number: int, base: Checkpoint) -> NDArray[np.float32]:
    arrays = ArrayRecord([base.params[s.offset : s.offset + s.size].reshape(s.shape) for s in SLOTS])
    with seeded(number):
        stock.configure_train(number, arrays, ConfigRecord(), PlanningGrid(NODES))
    messages = []
    for reply in Replies(vectors(number)):
        local = base.params + reply.update
        parts = [local[s.offset : s.offset + s.size].reshape(s.shape) for s in SLOTS]
        metrics = MetricRecord({"num-examples": reply.num_examples, **reply.metrics})
        content = RecordDict({"arrays": ArrayRecord(list(map(np.array, parts))), "metrics": metrics})
        instruction = Message(RecordDict(), dst_node_id=reply.node_id, message_type="train")
        messages.append(Message(content, reply_to=instruction))
    result, _ = stock.aggregate_train(number, messages)
    return np.concatenate([array.numpy().ravel() for array in result.values()]).astype(np.float32)


def test_folded_strategy_holds_one_reply_at_a_time() -> None:
    replies = Replies(vectors(1))
    driver("FedAdam").aggregate_train(1, checkpoint(), replies, 1)
    # One that is being folded, and the one before it until its name is bound again.
    assert replies.most_alive <= 2
    assert replies.passes == 1


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_strategy_aggregates_to_finite_float32(name: str) -> None:
    base = checkpoint()
    result = driver(name).aggregate_train(1, base, Replies(vectors(1)), 1)
    assert result.params.dtype == np.float32
    assert result.params.shape == (P,)
    assert np.isfinite(result.params).all()
    assert not np.array_equal(result.params, base.params)
    assert all(isinstance(value, float) for value in result.metrics.values())


def test_metrics_that_one_reply_lacks_are_left_out() -> None:
    replies = Replies(vectors(1))
    rows = list(replies)
    rows[3] = Reply(rows[3].node_id, 5, {"loss_first": 2.0}, rows[3].update, rows[3].buffers, 1.0)
    stream = ReplyStream(checkpoint(), rows, SLOTS)
    keys = {frozenset(message.content["metrics"]) for message in stream}
    assert keys == {frozenset({"num-examples", "loss_first"})}


@pytest.mark.parametrize("name", sorted(PRIVATE))
def test_update_of_zeros_does_not_break_differential_privacy(name: str) -> None:
    silent = [np.zeros(P, np.float32), *vectors(1, 10)]
    result = driver(name).aggregate_train(1, checkpoint(), Replies(silent), 1)
    assert np.isfinite(result.params).all()


def test_differential_privacy_weighs_every_device_the_same() -> None:
    name = "DifferentialPrivacyServerSideFixedClipping"
    quiet = {**PRIVATE[name], "noise_multiplier": 0.0, "clipping_norm": 1e6}
    result = driver(name, quiet).aggregate_train(1, checkpoint(), Replies(vectors(1)), 1)
    expected = checkpoint().params + np.mean(vectors(1), axis=0, dtype=np.float64)
    np.testing.assert_allclose(result.params, expected, rtol=0, atol=1e-6)


def test_differential_privacy_over_buffers_is_refused() -> None:
    name = "DifferentialPrivacyServerSideFixedClipping"
    with pytest.raises(ConfigurationError) as caught:
        StrategyDriver(build_strategy(name, PRIVATE[name]), SLOTS, buffers_size=3)
    assert "GroupNorm" in caught.value.hint


def test_noise_follows_from_the_seed_and_leaves_the_global_generators_alone() -> None:
    name = "DifferentialPrivacyServerSideFixedClipping"
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist()
    results = [
        driver(name).aggregate_train(1, checkpoint(), Replies(vectors(1)), seed).params for seed in (5, 5, 6)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_buffers_are_the_weighted_mean_or_the_median_under_a_robust_strategy() -> None:
    base = checkpoint(buffers=2)
    weights = np.array([10 + 3 * i for i in range(11)])
    mean = float((weights * np.arange(1.0, 12.0)).sum() / weights.sum())
    for name, expected in (("FedAvg", mean), ("QFedAvg", mean), ("FedMedian", 6.0), ("Krum", 6.0)):
        subject = StrategyDriver(build_strategy(name, DIRECT[name]), SLOTS, buffers_size=2)
        result = subject.aggregate_train(1, base, Replies(vectors(1), buffers=2), 1)
        np.testing.assert_allclose(result.buffers, expected, rtol=1e-6)


def test_strategy_that_can_do_nothing_is_a_round_error() -> None:
    with pytest.raises(RoundError, match="Bulyan"):
        driver("Bulyan").aggregate_train(1, checkpoint(), Replies(vectors(1, 5)), 1)


def test_strategy_that_fails_is_a_round_error() -> None:
    subject = driver("QFedAvg", {"client_learning_rate": 0.1, "train_loss_key": "absent"})
    with pytest.raises(RoundError, match="QFedAvg failed"):
        subject.aggregate_train(1, checkpoint(), Replies(vectors(1)), 1)


def test_evaluations_are_weighted() -> None:
    measured = [Measured(1, 10, {"accuracy": 0.5, "x": 1.0}), Measured(2, 30, {"accuracy": 0.9})]
    found = driver("FedAvg").aggregate_evaluate(1, measured)
    assert found == pytest.approx({"accuracy": 0.8, "num_examples": 40.0})


# ---- planning ----------------------------------------------------------------------------------------------


def test_cohort_follows_from_the_seed() -> None:
    parameters = {"fraction_train": 0.5}
    plans = [driver("FedAvg", parameters).plan_train(1, checkpoint(), NODES, seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1]
    assert plans[0].node_ids != plans[2].node_ids
    assert len(plans[0].node_ids) == 5
    assert set(plans[0].node_ids) < set(NODES)


def test_too_few_nodes_are_a_quorum_error_at_once() -> None:
    with pytest.raises(QuorumError) as caught:
        driver("FedAvg", {"min_available_nodes": 12}).plan_train(1, checkpoint(), NODES, 1)
    assert (caught.value.facts["present"], caught.value.facts["needed"]) == (11, 12)


def test_strategy_that_asks_for_ever_is_stopped() -> None:
    grid = PlanningGrid(NODES)
    for _ in range(8):
        assert grid.get_node_ids() == NODES
    with pytest.raises(QuorumError):
        grid.get_node_ids()


def test_what_a_strategy_writes_into_its_configuration_is_in_the_plan() -> None:
    assert driver("FedProx").plan_train(3, checkpoint(), NODES, 1).config == {
        "proximal-mu": 0.1,
        "server-round": 3,
    }
    private = driver("DifferentialPrivacyClientSideAdaptiveClipping")
    assert private.plan_train(1, checkpoint(), NODES, 1).config["clipping_norm"] == 0.1


def test_evaluation_without_a_fraction_asks_nobody() -> None:
    subject = driver("FedAvg", {"fraction_evaluate": 0.0})
    assert subject.plan_evaluate(1, checkpoint(), NODES, 1).node_ids == ()


# ---- state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ALL))
def test_state_that_goes_out_and_in_after_every_round_changes_no_bit(name: str) -> None:
    straight, base = driver(name), checkpoint()
    for number in range(1, 5):
        base = one_round(straight, number, base)
    hopping, state = checkpoint(), {}
    for number in range(1, 5):
        fresh = driver(name)
        fresh.import_state(state)
        hopping = one_round(fresh, number, hopping)
        state = dict(fresh.export_state())
    np.testing.assert_array_equal(base.params, hopping.params)


def test_round_may_be_aggregated_by_a_process_that_did_not_plan_it() -> None:
    for name in ALL:
        base = checkpoint()
        planned = one_round(driver(name), 1, base)
        other = driver(name).aggregate_train(1, base, Replies(vectors(1)), 1)
        np.testing.assert_array_equal(planned.params, other.params)


def test_empty_state_makes_a_strategy_as_new() -> None:
    subject = driver("FedAdam")
    first = one_round(subject, 1, checkpoint())
    subject.import_state({})
    np.testing.assert_array_equal(one_round(subject, 1, checkpoint()).params, first.params)


def test_adaptive_clipping_norm_of_a_new_run_is_the_configured_one() -> None:
    subject = driver("DifferentialPrivacyServerSideAdaptiveClipping")
    before = subject.export_state()
    one_round(subject, 1, checkpoint())
    assert subject.export_state() != before
    subject.import_state({})
    assert subject.export_state() == before


@pytest.mark.parametrize("state", [{"m_t": b"\x00"}, {"m_t": b"\x81\x84aabi8\x80@"}, {"v": b""}])
def test_damaged_or_foreign_state_is_a_storage_error(state: dict[str, bytes]) -> None:
    with pytest.raises(StorageError):
        driver("FedAdam").import_state(state)


def test_state_of_another_strategy_is_refused() -> None:
    subject = driver("FedAdam")
    one_round(subject, 1, checkpoint())
    with pytest.raises(StorageError) as caught:
        driver("FedAvg").import_state(subject.export_state())
    assert "new run" in caught.value.hint


# ---- records -----------------------------------------------------------------------------------------------


def test_record_shares_the_vectors_memory_and_comes_back_equal() -> None:
    set_identity()
    vector = vectors(1)[0]
    record = to_record(vector, SLOTS)
    assert np.shares_memory(record["first.weight"].numpy(), vector)
    np.testing.assert_array_equal(to_vector(record, SLOTS), vector)


def test_float64_arrays_come_back_as_float32() -> None:
    doubled = ArrayRecord({s.name: a for s, a in zip(SLOTS, record_arrays(np.float64), strict=True)})
    assert to_vector(doubled, SLOTS).dtype == np.float32


def record_arrays(dtype: Any) -> list[Any]:
    from flwr.app import Array

    return [Array(np.zeros(slot.shape, dtype)) for slot in SLOTS]


def test_arrays_that_are_missing_or_misshapen_are_a_round_error() -> None:
    arrays = dict(zip([slot.name for slot in SLOTS], record_arrays(np.float32), strict=True))
    with pytest.raises(RoundError, match="other tensors"):
        to_vector(ArrayRecord({"first.bias": arrays["first.bias"]}), SLOTS)
    with pytest.raises(RoundError, match="returned first"):
        to_vector(ArrayRecord({**arrays, "first.bias": arrays["scale"]}), SLOTS)


def test_export_of_a_strategy_without_state_is_empty() -> None:
    assert export_state(build_strategy("FedAvg")) == {}
