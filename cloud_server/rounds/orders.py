"""Orders: what each device of a cohort is asked, and what its reply must then look like. Pure.

Laws of the file: an order's id comes from the run's secret seed, so the same round asks the same after a
restart and nobody can guess the id of an order that was not sent to him.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from cloud_server.db.rounds import OrderRow, RoundRow
from cloud_server.release.gate import SERVED
from cloud_server.rounds.draws import order_id
from cloud_server.rounds.plan import RunPlan
from cloud_server.rounds.ports import Scalar
from cloud_server.screening import TRAIN_METRICS, Expected
from wire.errors import StorageError
from wire.messages import MAX_BODY_BYTES, Order, TrainConfig

_CODEC_BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "int2": 2, "sign": 1, "dithered": 4}
# Torch's name of BatchNorm's variance.
_VARIANCE = "running_var"
_SHARE = "accuracy"
_EVALUATION_BYTES = 64 * 1024
# Order bytes of an envelope: head, hybrid key, signature, CBOR of the body's other fields.
_ENVELOPE_BYTES = 64 * 1024
# What a strategy may write into its configuration, and the setting of the devices that it means.
_STRATEGY_KEYS = {"proximal-mu": "proximal_mu", "clipping_norm": "clipping_norm"}


def merged_train(train: TrainConfig, wanted: Mapping[str, Scalar], seed: int) -> TrainConfig:
    """The run's training configuration with what the strategy wants of it in this round, and the round's
    seed."""
    changes: dict[str, Any] = {"seed": seed}
    for key, name in _STRATEGY_KEYS.items():
        if key in wanted:
            changes[name] = float(wanted[key])
    return msgspec.structs.replace(train, **changes)


def round_train(row: RoundRow) -> TrainConfig:
    """How the devices of a round train, as it was committed."""
    try:
        return msgspec.convert(row.config["train"], TrainConfig)
    except (KeyError, msgspec.ValidationError) as error:
        raise StorageError(f"round {row.number} has no usable configuration") from error


def round_norm(row: RoundRow) -> float:
    """How long (L2 norm) an update of this round may be by those of earlier rounds, as it was committed."""
    return float(row.config.get("norm_bound", math.inf))


def needed_metrics(plan: RunPlan, kind: str) -> frozenset[str]:
    """What a reply to an order (`train` or `evaluate`) must say of itself."""
    return TRAIN_METRICS if kind == "train" else frozenset({"loss", plan.manifest.task.metric})


def make_orders(
    seed: int, number: int, kind: str, members: Iterable[tuple[str, int]], head_sha256: bytes, deadline: float
) -> list[OrderRow]:
    """One order for each (device, node id).

    Args:
        seed: of the run.
    """
    return [
        OrderRow(
            order_id=order_id(seed, number, kind, device),
            round_number=number,
            device=device,
            node_id=node_id,
            kind=kind,
            head_sha256=head_sha256,
            deadline=deadline,
        )
        for device, node_id in members
    ]


def order_message(plan: RunPlan, row: OrderRow, train: TrainConfig) -> Order:
    """The order as it travels."""
    return Order(
        order_id=row.order_id,
        kind="train" if row.kind == "train" else "evaluate",
        run=plan.run,
        round_number=row.round_number,
        head_sha256=row.head_sha256,
        deadline=row.deadline,
        slot_bytes=_slot_bytes(plan, row.kind, train),
    )


def expected_reply(
    plan: RunPlan, row: OrderRow, train: TrainConfig, max_examples: int, norm_bound: float = math.inf
) -> Expected:
    """What the reply to an order must be like.

    Args:
        norm_bound: see `round_norm`; what devices are told to clip to bounds an update in any case.
    """
    manifest = plan.manifest
    return Expected(
        device=row.device,
        kind=row.kind,
        run=plan.run,
        round_number=row.round_number,
        base_sha256=row.head_sha256,
        graphs_sha256=plan.graphs_sha256,
        params_size=manifest.params_size,
        buffers_size=manifest.buffers_size,
        max_examples=1 if plan.is_private else max_examples,
        clipping_norm=min(train.clipping_norm, norm_bound),
        codecs=frozenset({train.codec}),
        keeps_metrics=not plan.is_private,
        metrics=needed_metrics(plan, row.kind),
        shares=frozenset({_SHARE, SERVED + _SHARE}),
        variances=tuple(
            (slot.offset, slot.offset + slot.size)
            for slot in manifest.buffers
            if slot.name.endswith(_VARIANCE)
        ),
    )


def _slot_bytes(plan: RunPlan, kind: str, train: TrainConfig) -> int:
    """The largest sealed reply that is sound: payload, scales of its blocks, buffers, padding (12 %),
    envelope."""
    if kind == "evaluate":
        return _EVALUATION_BYTES
    payload = plan.manifest.params_size * (_CODEC_BITS[train.codec] / 8 + 1 / 16)
    return min(MAX_BODY_BYTES, int(1.2 * (payload + 2 * plan.manifest.buffers_size)) + _ENVELOPE_BYTES)
