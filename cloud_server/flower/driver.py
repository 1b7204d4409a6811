"""One of Flower's strategies as the round's `Strategy`: planned, given its replies, its state kept.

Laws of the file: the strategy sees model parameters only (buffers are averaged here: a server optimizer
would make a variance negative); replies are either one exact weighted mean (`is_folded`) or a re-iterable
stream decoded as it is read; whatever a strategy raises becomes a `RoundError`, for one bad round must not
end the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from numpy.typing import NDArray

from cloud_server.aggregate.fold import Fold
from cloud_server.aggregate.rules import MEDIAN, Device, aggregate_rows
from cloud_server.flower.planning import PlanningGrid, seeded
from cloud_server.flower.private import AppExitException, cheap_collections, set_identity
from cloud_server.flower.records import common_metrics, to_config, to_metrics, to_record, to_vector
from cloud_server.flower.robust import ROBUST
from cloud_server.flower.state import export_state, import_state, set_base
from cloud_server.flower.strategies import (
    clipping,
    innermost,
    is_client_adaptive,
    is_differentially_private,
    is_folded,
    is_robust,
    needed_nodes,
    needs_reference,
)
from cloud_server.rounds.ports import Aggregate, Measured, Plan, Replies, Reply, Vector
from wire.checkpoint import Checkpoint
from wire.errors import ConfigurationError, RoundError
from wire.manifest import TensorSlot

WEIGHT_KEY = "num-examples"
_ARRAYS, _METRICS = "arrays", "metrics"
Reference = Callable[[Checkpoint, int], Vector]
"""Trains on the operator's clean samples from a base, by a seed: float32 [P], the parameters that come of it."""
# What Flower's strategies and the numpy under them raise on replies that they cannot use.
_STRATEGY_ERRORS = (AppExitException, ArithmeticError, ValueError, LookupError, TypeError)


class StrategyDriver:
    """Drives one strategy.

    Args:
        strategy: from `build_strategy`.
        slots: the tensors of the parameter vector.
        buffers_size: Q of the model.
        make_fold: makes the accumulator of a parameter vector of a given length; its device is chosen there.
        device: torch device of a robust rule; None for the CPU.
        reference: for FLTrust.
        timed: makes a context around each aggregation of updates, for a metric.

    Raises:
        ConfigurationError: (operator) differential privacy over a model with buffers, whose statistics no
        noise hides; FLTrust without samples of the operator's.
    """

    def __init__(
        self,
        strategy: FlowerStrategy,
        slots: Sequence[TensorSlot],
        *,
        buffers_size: int = 0,
        make_fold: Callable[[int], Fold] = Fold,
        device: Device | None = None,
        reference: Reference | None = None,
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        set_identity()
        self._strategy = strategy
        self._slots = slots
        self._make_fold = make_fold
        self._timed = timed
        self._device = device
        self._reference = reference
        self._initial = export_state(strategy)
        self._is_folded = is_folded(strategy)
        self._is_private = is_differentially_private(strategy)
        self._buffers_size = buffers_size
        if self._is_private and buffers_size:
            raise ConfigurationError(
                "differential privacy does not cover the model's buffers (BatchNorm statistics)",
                hint="use a model with GroupNorm",
            )
        if needs_reference(strategy) and reference is None:
            raise ConfigurationError(
                "FLTrust needs clean labelled samples of the operator's own",
                hint="put them into refine.data of the state folder",
            )

    # ---- planning ----

    def plan_train(self, round_number: int, base: Checkpoint, node_ids: Iterable[int], seed: int) -> Plan:
        """Draws the cohort of a round; see `rounds.ports.Strategy`."""
        ids = list(node_ids)
        grid = PlanningGrid(ids, needed_nodes(self._strategy, "train", len(ids)))
        record = to_record(base.params, self._slots)
        with seeded(seed):
            messages = self._strategy.configure_train(round_number, record, ConfigRecord(), grid)
            return _plan(messages)

    def plan_evaluate(self, round_number: int, head: Checkpoint, node_ids: Iterable[int], seed: int) -> Plan:
        """Draws who evaluates; see `rounds.ports.Strategy`."""
        ids = list(node_ids)
        grid = PlanningGrid(ids, needed_nodes(self._strategy, "evaluate", len(ids)))
        record = to_record(head.params, self._slots)
        with seeded(seed):
            messages = self._strategy.configure_evaluate(round_number, record, ConfigRecord(), grid)
            return _plan(messages)

    # ---- aggregating ----

    def aggregate_train(self, round_number: int, base: Checkpoint, replies: Replies, seed: int) -> Aggregate:
        """Aggregates; see `rounds.ports.Strategy`."""
        with self._timed():
            return self._aggregate(round_number, base, replies, seed)

    def _aggregate(self, round_number: int, base: Checkpoint, replies: Replies, seed: int) -> Aggregate:
        set_base(self._strategy, to_record(base.params, self._slots))
        self._prepare(base, seed)
        stream: Iterable[Message]
        if self._is_folded:
            message, buffers = self._prefold(base, replies, seed)
            stream = [message]
        else:
            stream = ReplyStream(
                base, replies, self._slots, is_uniform=self._is_private, norm_bit_above=self._norm_bit_above()
            )
            buffers = self._fold_buffers(base, replies, seed)
        name = type(self._strategy).__name__
        try:
            with seeded(seed), cheap_collections():
                arrays, metrics = self._strategy.aggregate_train(round_number, stream)
        except _STRATEGY_ERRORS as error:
            raise RoundError(f"{name} failed: {error}") from error
        if arrays is None:
            raise RoundError(f"{name} made nothing of {len(replies)} updates")
        return Aggregate(to_vector(arrays, self._slots), buffers, to_metrics(metrics))

    def _norm_bit_above(self) -> float | None:
        """The norm above which an update counts as clipped, where the strategy wants to know."""
        strategy: Any = self._strategy
        return float(strategy.clipping_norm) if is_client_adaptive(strategy) else None

    def _prepare(self, base: Checkpoint, seed: int) -> None:
        """Gives one of our own rules what Flower's do not have."""
        inner, reference = innermost(self._strategy), self._reference
        if type(inner) in ROBUST.values():
            inner.device = self._device
        if needs_reference(self._strategy) and reference is not None:
            inner.train_reference = lambda _: to_record(reference(base, seed), self._slots)

    def _prefold(self, base: Checkpoint, replies: Replies, seed: int) -> tuple[Message, Vector]:
        """All replies as one: the exact weighted mean, in memory that does not grow with the cohort, or what our
        default makes of them."""
        clip = clipping(self._strategy)
        metrics = [reply.metrics for reply in replies] if clip is not None else []
        if clip is not None and metrics:
            step, weights = clip.fold(
                lambda: ((reply.node_id, reply.num_examples, reply.update) for reply in replies),
                size=base.params.size,
                seed=seed,
            )
            buffers = self._fold_buffers(base, replies, seed)
        else:
            step, buffers, weights, metrics = self._mean(base, replies)
        total = sum(weights)
        local = (base.params + step).astype(np.float32)
        averaged: dict[str, float | int] = {
            key: sum(w * m[key] for w, m in zip(weights, metrics, strict=True)) / total
            for key in common_metrics(metrics)
        }
        content = _content(to_record(local, self._slots), {WEIGHT_KEY: total, **averaged})
        return _reply_message(content, 1), buffers

    def _mean(
        self, base: Checkpoint, replies: Replies
    ) -> tuple[NDArray[np.float64], Vector, list[int], list[Mapping[str, float]]]:
        """The weighted means of updates and buffers; and the weights and metrics of the replies."""
        fold, buffers = self._make_fold(base.params.size), Fold(base.buffers.size)
        metrics: list[Mapping[str, float]] = []
        weights: list[int] = []
        for reply in replies:
            fold.add(reply.update, reply.num_examples)
            buffers.add(reply.buffers, reply.num_examples)
            metrics.append(reply.metrics)
            weights.append(reply.num_examples)
        if not weights:
            raise RoundError("no update to fold")
        return fold.mean(), buffers.mean().astype(np.float32), weights, metrics

    def _fold_buffers(self, base: Checkpoint, replies: Replies, seed: int) -> Vector:
        """Buffers: the median of at most 64 rows under a robust strategy, else the mean."""
        if not base.buffers.size:
            return base.buffers
        if is_robust(innermost(self._strategy)):
            vectors = (reply.buffers for reply in replies)
            return aggregate_rows(vectors, len(replies), base.buffers.size, MEDIAN, seed=seed)
        fold = Fold(base.buffers.size)
        for reply in replies:
            fold.add(reply.buffers, reply.num_examples)
        return fold.mean().astype(np.float32)

    def aggregate_evaluate(self, round_number: int, measured: list[Measured]) -> Mapping[str, float]:
        """The cohort's metrics as the strategy weighs them, and under `num_examples` the weight of all."""
        keys = common_metrics([each.metrics for each in measured])
        messages = []
        for each in measured:
            metrics = {WEIGHT_KEY: each.num_examples, **{key: each.metrics[key] for key in keys}}
            messages.append(_reply_message(_content(None, metrics), each.node_id, MessageType.EVALUATE))
        try:
            record = self._strategy.aggregate_evaluate(round_number, messages)
        except _STRATEGY_ERRORS as error:
            raise RoundError(f"{type(self._strategy).__name__} failed: {error}") from error
        return {**to_metrics(record), "num_examples": float(sum(each.num_examples for each in measured))}

    # ---- state ----

    def export_state(self) -> Mapping[str, bytes]:
        """What must survive a restart."""
        return export_state(self._strategy)

    def import_state(self, state: Mapping[str, bytes]) -> None:
        """Puts the strategy where `export_state` found it; with nothing, where it began."""
        import_state(self._strategy, {**self._initial, **state})


class ReplyStream:
    """Replies as Flower's messages, made as they are read: iterates as often as wanted.

    Args:
        is_uniform: every reply weighs the same, which the noise of differential privacy is calibrated for.
        norm_bit_above: each reply gets Flower's `norm_bit`: whether the device's update was longer than this.
    """

    def __init__(
        self,
        base: Checkpoint,
        replies: Replies,
        slots: Sequence[TensorSlot],
        *,
        is_uniform: bool = False,
        norm_bit_above: float | None = None,
    ) -> None:
        self._base = base
        self._replies = replies
        self._slots = slots
        self._is_uniform = is_uniform
        self._norm_bit_above = norm_bit_above
        self._keys = common_metrics([reply.metrics for reply in replies])

    def __len__(self) -> int:
        return len(self._replies)

    def __iter__(self) -> Iterator[Message]:
        for reply in self._replies:
            yield self._message(reply)

    def _message(self, reply: Reply) -> Message:
        local = self._base.params + reply.update
        if self._is_uniform and np.array_equal(local, self._base.params):
            # Flower's clipping divides by the norm of the update: one ulp keeps it from dividing by zero.
            largest = int(np.argmax(np.abs(local)))
            local[largest] = np.nextafter(local[largest], np.float32(np.inf)) if local[largest] else 1e-6
        weight = 1 if self._is_uniform else reply.num_examples
        metrics = {WEIGHT_KEY: weight, **{key: reply.metrics[key] for key in self._keys}}
        if self._norm_bit_above is not None:
            # The device says how long its update was before it clipped it.
            metrics["norm_bit"] = int(reply.metrics.get("update_norm", reply.norm) > self._norm_bit_above)
        return _reply_message(_content(to_record(local, self._slots), metrics), reply.node_id)


def _plan(messages: Iterable[Message]) -> Plan:
    listed = list(messages)
    if not listed:
        return Plan((), {})
    config = next(iter(listed[0].content.config_records.values()), ConfigRecord())
    return Plan(tuple(message.metadata.dst_node_id for message in listed), to_config(config))


def _content(arrays: ArrayRecord | None, metrics: Mapping[str, float | int]) -> RecordDict:
    content = RecordDict()
    if arrays is not None:
        content[_ARRAYS] = arrays
    content[_METRICS] = MetricRecord(dict(metrics))
    return content


def _reply_message(content: RecordDict, node_id: int, message_type: str = MessageType.TRAIN) -> Message:
    """A reply as it would come from a node: its metadata follow from an instruction to that node."""
    instruction = Message(RecordDict(), dst_node_id=node_id, message_type=message_type)
    return Message(content, reply_to=instruction)
