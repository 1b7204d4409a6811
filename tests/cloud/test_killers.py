"""No reply whatever ends a round: what is known to kill Flower's runs, one device sending it, under every strategy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud_server.db import schema
from cloud_server.flower.driver import StrategyDriver
from cloud_server.flower.robust import ROBUST
from cloud_server.flower.strategies import PLAIN, REFUSED, WRAPPERS, build_strategy
from cloud_server.screening import Refusal
from tests.cloud.round_lab import Device, Lab, Message, make_manifest
from tests.cloud.test_strategies import ALL
from wire.cbor import encode_canonical
from wire.checkpoint import Checkpoint
from wire.errors import ConfigurationError
from wire.messages import Order, TrainConfig

# Bulyan with two attackers needs eleven sound updates: one more than that, so that a refused one does not end it.
DEVICES, KILLER = 12, "d05"
CLIPPING_NORM = 100.0
STRATEGIES: dict[str, dict[str, Any]] = {**ALL, **{name: {} for name in ROBUST}}
# One of each way to aggregate at once; the others take minutes.
_QUICK = {"ClippedMean", "FedAvg", "QFedAvg", "Bulyan", "DifferentialPrivacyServerSideFixedClipping"}
EVERY = [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in sorted(STRATEGIES)]
Behaviour = Callable[[Device, Order], Message]


def filled(value: float) -> Behaviour:
    """An update of one value everywhere, past an encoder that would refuse it."""

    def behave(device: Device, order: Order) -> Message:
        update = device.update(order)
        payload = update.payload[: -4 * update.params_size]
        vector = np.full(update.params_size, value, "<f4")
        return device.message(msgspec.structs.replace(update, payload=payload + vector.tobytes()), order)

    return behave


def update_of(vector: Callable[[int], np.ndarray[Any, Any]]) -> Behaviour:
    def behave(device: Device, order: Order) -> Message:
        made = vector(device.lab.plan.manifest.params_size).astype(np.float32)
        return device.message(device.update(order, made), order)

    return behave


def saying(**changes: Any) -> Behaviour:
    """A sound update whose body says something else, even what our encoder does not write; None leaves a key out."""

    def behave(device: Device, order: Order) -> Message:
        message = device.honest(order)
        plain = msgspec.to_builtins(device.update(order), builtin_types=(bytes,)) | changes
        body = encode_canonical({key: value for key, value in plain.items() if value is not None})
        return replace(message, body=body)

    return behave


def metrics(**changes: Any) -> dict[str, float]:
    """The metrics of a sound update with changes; None leaves one out."""
    sound = {"loss_first": 1.5, "loss_last": 0.5, "update_norm": 1.0}
    return {name: value for name, value in {**sound, **changes}.items() if value is not None}


REFUSED_KILLERS: dict[str, tuple[Behaviour, Refusal]] = {
    "NaN": (filled(math.nan), Refusal.NOT_DECODABLE),
    "inf": (filled(-math.inf), Refusal.NOT_DECODABLE),
    "1e15 examples": (saying(num_examples=10**15), Refusal.MALFORMED),
    "no example": (saying(num_examples=0), Refusal.MALFORMED),
    "fewer than no examples": (saying(num_examples=-40), Refusal.MALFORMED),
    "half an example": (saying(num_examples=0.5), Refusal.MALFORMED),
    "a value too few": (update_of(lambda size: np.ones(size - 1)), Refusal.WRONG_SIZE),
    "a value too many": (update_of(lambda size: np.ones(size + 1)), Refusal.WRONG_SIZE),
    "no payload": (saying(payload=None), Refusal.MALFORMED),
    "unknown key": (saying(surprise=1), Refusal.MALFORMED),
    "no loss": (saying(metrics=metrics(loss_first=None)), Refusal.MISSING_METRIC),
    "no metric": (saying(metrics={}), Refusal.MISSING_METRIC),
    "loss below zero": (saying(metrics=metrics(loss_first=-1.0)), Refusal.IMPLAUSIBLE),
    "loss of 1e300": (saying(metrics=metrics(loss_last=1e300)), Refusal.IMPLAUSIBLE),
}
CAPPED_KILLERS: dict[str, Behaviour] = {
    "1e30": filled(1e30),
    "the largest number": filled(float(np.finfo(np.float32).max)),
    "2**31 examples": saying(num_examples=2**31),
    "extra metric": saying(metrics=metrics(surprise=7.0)),
    "unchanged model": update_of(np.zeros),
    "loss of zero": saying(metrics=metrics(loss_first=0.0, loss_last=0.0)),
    "loss of 1e12": saying(metrics=metrics(loss_first=1e12)),
}


def lab_with(strategy: str, killer: Behaviour) -> Lab:
    manifest = make_manifest()

    def reference(base: Checkpoint, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        moved: np.ndarray[Any, np.dtype[np.float32]] = base.params + np.float32(0.1)
        return moved

    def make() -> StrategyDriver:
        built = build_strategy(strategy, STRATEGIES[strategy])
        return StrategyDriver(built, manifest.params, reference=reference)

    lab = Lab(
        DEVICES,
        make_strategy=make,
        rounds=1,
        evaluate_every=0,
        train=TrainConfig(codec="fp32", clipping_norm=CLIPPING_NORM),
    )
    lab.devices[KILLER].behaviour = killer
    return lab


def check_round(lab: Lab, head: Checkpoint, counted: int) -> None:
    """One round, which did not fail, whose head is finite and made of every honest update."""
    (row,) = lab.rows(schema.rounds)
    assert (row.state, row.reason) == ("done", "")
    assert np.isfinite(head.params).all()
    assert np.linalg.norm(head.params - lab.initial.params) <= 1.01 * CLIPPING_NORM
    assert row.metrics["train_devices"] == counted
    folded = {each.device for each in lab.rows(schema.updates) if each.state == "folded"}
    assert folded >= set(lab.devices) - {KILLER}


def test_there_are_eighteen_strategies_of_flower() -> None:
    assert len(PLAIN) + len(WRAPPERS) + len(REFUSED) == 18
    assert STRATEGIES.keys() == {*PLAIN, *WRAPPERS, *ROBUST}


@pytest.mark.parametrize("name", REFUSED)
def test_strategy_of_trees_is_refused_before_any_reply(name: str) -> None:
    with pytest.raises(ConfigurationError):
        build_strategy(name)


@pytest.mark.parametrize("killer", REFUSED_KILLERS)
@pytest.mark.parametrize("strategy", EVERY)
def test_killer_is_refused_with_its_reason_and_the_round_ends_without_it(strategy: str, killer: str) -> None:
    behaviour, refusal = REFUSED_KILLERS[killer]
    lab = lab_with(strategy, behaviour)
    head = lab.run()
    check_round(lab, head, DEVICES - 1)
    receipts = {(receipt.verdict, receipt.reason) for receipt in lab.devices[KILLER].receipts}
    assert receipts == {("refused", str(refusal))}


@pytest.mark.parametrize("killer", CAPPED_KILLERS)
@pytest.mark.parametrize("strategy", EVERY)
def test_killer_that_is_sound_in_form_counts_for_no_more_than_one_device(strategy: str, killer: str) -> None:
    lab = lab_with(strategy, CAPPED_KILLERS[killer])
    head = lab.run()
    check_round(lab, head, DEVICES)
    (row,) = (each for each in lab.rows(schema.updates) if each.device == KILLER)
    assert row.num_examples <= lab.max_examples(KILLER)


def evaluating(**changes: Any) -> Behaviour:
    def behave(device: Device, order: Order) -> Message:
        if order.kind == "train":
            return device.honest(order)
        said = {**device.evaluation(order).metrics, **changes}
        sound = {name: value for name, value in said.items() if value is not None}
        plain = msgspec.to_builtins(device.evaluation(order), builtin_types=(bytes,)) | {"metrics": sound}
        return replace(device.honest(order), body=encode_canonical(plain))

    return behave


@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize(
    ("killer", "refusal"),
    [
        (evaluating(accuracy=None), Refusal.MISSING_METRIC),
        (evaluating(accuracy=math.nan), Refusal.MALFORMED),
        (evaluating(accuracy=1e30), Refusal.IMPLAUSIBLE),
        (evaluating(loss=-1.0), Refusal.IMPLAUSIBLE),
        (evaluating(surprise=3.0), None),
    ],
    ids=["no accuracy", "NaN", "1e30", "loss below zero", "extra metric"],
)
def test_evaluation_that_kills_is_left_out_and_the_rest_is_decided(
    strategy: str, killer: Behaviour, refusal: Refusal | None
) -> None:
    lab = lab_with(strategy, killer)
    lab.plan = replace(lab.plan, policy=replace(lab.plan.policy, evaluate_every=1))
    lab.restart()
    lab.run()
    assert lab.candidates[1].devices == DEVICES - (refusal is not None)
    assert 0.0 < lab.candidates[1].metrics["accuracy"] <= 1.0
    assert lab.devices[KILLER].receipts[-1].reason == str(refusal or "")
