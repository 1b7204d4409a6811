"""A masked run on the real runner, database and strategy: exact means, drop-outs, and a process that ends anywhere."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cloud_server.db import schema
from cloud_server.flower.strategies import build_strategy
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.runner import RoundRunner
from cloud_server.secure.desk import MaskedPerformer, MaskingPorts
from cloud_server.secure.groups import MAX_MESSAGE_BYTES
from cloud_server.secure.opening import check_setup, masking_rules
from edge_agent.rounds.draws import Draws
from edge_agent.rounds.masking import DeviceMasking
from tests.cloud.round_lab import BlownFuseError, Device, Fuse, Lab, Message, rng_of
from wire.errors import ConfigurationError, MessageError
from wire.messages import (
    Join,
    MaskInbox,
    MaskQuestion,
    MaskRoster,
    Order,
    TrainConfig,
)
from wire.primitives import SigningKey
from wire.ring import decode_mean, encode_ring, ring_of

DEVICES = 6
Sent = Order | MaskRoster | MaskInbox | MaskQuestion


class MaskedDevice:
    """The agent's part of masked rounds, without an agent."""

    def __init__(self, device: Device, lab: MaskedRun) -> None:
        self.device, self.lab = device, lab
        self.key = SigningKey(hashlib.sha256(device.name.encode()).digest())
        self.rounds: dict[bytes, tuple[Order, DeviceMasking]] = {}
        self.updates: dict[bytes, Message] = {}

    def clipped(self, order: Order) -> NDArray[np.float32]:
        vector = self.device.local_update(order)
        limit = self.lab.plan.train.clipping_norm
        return (vector * min(1.0, limit / float(np.linalg.norm(vector)))).astype(np.float32)

    def hear(self, body: Sent) -> None:
        runner, name = self.lab.runner, self.device.name
        if isinstance(body, Order):
            if body.kind == "evaluate":
                answer = self.device.answer(body)
                assert answer is not None
                self.lab.feed(name, body, answer)
                return
            if body.order_id not in self.rounds:
                rng = random.Random(f"{name} {body.round_number}")
                masking = DeviceMasking(
                    body, tenant="t", fleet="f", device=name, key=self.key, random=rng.randbytes
                )
                self.rounds[body.order_id] = (body, masking)
            runner.on_join(name, Join(order_id=body.order_id, accepted=True))
            runner.on_masking(name, self.rounds[body.order_id][1].keys())
            return
        order, masking = self.rounds[body.order_id]
        if isinstance(body, MaskRoster):
            runner.on_masking(name, masking.share(body))
        elif isinstance(body, MaskQuestion):
            runner.on_masking(name, masking.open(body))
        else:
            masking.receive(body)
            if masking.is_ready:
                ring, values = ring_of(self.lab.terms(order)), self.lab.values(name, order)
                update = self.device.update(
                    order,
                    num_examples=1,
                    codec=ring.name,
                    payload=masking.mask(values).tobytes(),
                    buffers=b"",
                    metrics={},
                )
                self.updates[order.order_id] = self.device.message(update, order)
            self.lab.send_up(name, self.updates[order.order_id])


class MaskedRun(Lab):
    """The lab with masked rounds. `mute` says which devices no longer answer from which type of message on."""

    def __init__(self, devices: int = DEVICES, **options: Any) -> None:
        self.messages: deque[tuple[str, Sent]] = deque()
        self.masked: dict[str, MaskedDevice] = {}
        self.mute: dict[str, type[Sent]] = {}
        self.dropout = options.pop("dropout", 0.34)
        self.message_bytes = options.pop("message_bytes", MAX_MESSAGE_BYTES)
        self.log: list[tuple[str, Sent]] = []
        options.setdefault("train", TrainConfig(codec="int8", clipping_norm=5.0))
        super().__init__(devices, make_runner=self._masked_runner, secure="pairwise", **options)
        self.masked = {name: MaskedDevice(device, self) for name, device in self.devices.items()}

    def _masked_runner(self, plan: RunPlan, ports: RunPorts) -> RoundRunner:
        ports_of_masking = MaskingPorts(
            tenant="t",
            fleet="f",
            dropout=self.dropout,
            colluding=0.0,
            update_key=lambda name: SigningKey(hashlib.sha256(name.encode()).digest()).public_bytes,
            send=lambda name, body, deadline: self.send_down(name, body),
            message_bytes=self.message_bytes,
        )
        return RoundRunner(
            plan, ports, make_desk=lambda *parts: MaskedPerformer(*parts, masking=ports_of_masking)
        )

    def values(self, name: str, order: Order) -> NDArray[Any]:
        """What a device masks."""
        return encode_ring(
            self.masked[name].clipped(order), ring_of(self.terms(order)), Draws(order.round_number)
        )

    def terms(self, order: Order) -> Any:
        return order.masking

    def send_order(self, device: str, order: Order) -> None:
        super().send_order(device, order)
        self.inbox.clear()
        self.send_down(device, order, is_counted=False)

    def send_down(self, device: str, body: Sent, *, is_counted: bool = True) -> None:
        if is_counted:
            self.fuse.burn("before masking message")
        self.messages.append((device, body))
        self.log.append((device, body))

    def deliver(self) -> None:
        while self.messages:
            name, body = self.messages[0]
            deaf = self.mute.get(name)
            if name not in self.absent and not (deaf is not None and isinstance(body, deaf)):
                self.masked[name].hear(body)
            self.messages.popleft()

    def step(self) -> None:
        self.runner.tick()
        if self.messages:
            self.deliver()
        elif not self.runner.is_finished:
            self.clock.time = max(self.clock.time, min(self.runner.next_tick, self.clock.time + 3600))

    def mean_of(self, names: list[str], order: Order) -> NDArray[np.float32]:
        """The mean of what these devices encoded, by plain sums."""
        ring = ring_of(self.terms(order))
        total = np.zeros(self.plan.manifest.params_size, ring.dtype)
        for name in names:
            total += encode_ring(self.masked[name].clipped(order), ring, Draws(order.round_number))
        return decode_mean(total, ring, len(names))

    def first_order(self) -> Order:
        return next(body for _, body in self.log if isinstance(body, Order) and body.kind == "train")

    def order_of(self, name: str) -> Order:
        return next(
            body
            for device, body in self.log
            if device == name and isinstance(body, Order) and body.kind == "train"
        )

    def states(self) -> list[str]:
        return [row.state for row in self.rows(schema.rounds)]


def test_masked_round_moves_the_head_by_the_exact_mean() -> None:
    lab = MaskedRun(rounds=1)
    head = lab.run()
    wanted = lab.initial.params + lab.mean_of(sorted(lab.devices), lab.first_order())
    assert np.array_equal(head.params, wanted)
    assert lab.states() == ["done"]


def test_stored_masked_updates_are_not_the_encodings() -> None:
    """What lies in the database says nothing by itself."""
    lab = MaskedRun(rounds=1)
    lab.run()
    order = lab.first_order()
    for device in lab.masked.values():
        (message,) = device.updates.values()
        plain = encode_ring(device.clipped(order), ring_of(lab.terms(order)), Draws(1)).tobytes()
        assert len(message.body) > len(plain)
        assert plain not in message.body


@pytest.mark.parametrize("kind", [Order, MaskRoster, MaskInbox, MaskQuestion])
def test_masked_round_survives_devices_that_fall_silent(kind: type[Sent]) -> None:
    """Before keys, before shares, after sharing, and before the masks are told."""
    lab = MaskedRun(rounds=1, mask_seconds=20.0)
    lab.mute = {"d01": kind, "d04": kind}
    head = lab.run()
    went = sorted(lab.devices) if kind is MaskQuestion else sorted(set(lab.devices) - set(lab.mute))
    assert np.array_equal(head.params, lab.initial.params + lab.mean_of(went, lab.first_order()))
    assert lab.states() == ["done"]


@pytest.mark.parametrize("kind", [Order, MaskRoster, MaskInbox, MaskQuestion])
def test_masked_round_of_too_few_fails_and_folds_nothing(kind: type[Sent]) -> None:
    lab = MaskedRun(rounds=1, mask_seconds=20.0, quorum=3)
    lab.mute = dict.fromkeys(("d00", "d01", "d02", "d03"), kind)
    for _ in range(60):
        lab.step()
        if "failed" in lab.states():
            break
    assert lab.states()[0] == "failed"
    assert lab.runner.head.sha256 == lab.initial.sha256
    lab.mute = {}
    lab.run()
    assert lab.states()[-1] == "done"


@pytest.mark.slow
def test_masked_round_comes_out_the_same_wherever_the_process_ends() -> None:
    """At commits and sends of every phase: a new process asks again, devices answer the same, the head is the same."""
    straight = MaskedRun(rounds=1)
    straight.fuse = straight.database.fuse = Fuse()
    wanted = straight.run()
    steps = len(straight.fuse.steps)
    assert steps > 20
    outcomes = []
    for at in range(0, steps, 5):
        lab = MaskedRun(rounds=1)
        lab.fuse = lab.database.fuse = Fuse(at)
        try:
            lab.run()
        except BlownFuseError:
            lab.fuse = lab.database.fuse = Fuse()
            lab.restart()
            lab.run()
        outcomes.append(lab.states())
        assert lab.runner.head.sha256 == wanted.sha256, straight.fuse.steps[at]
    assert all(states == ["done"] for states in outcomes)


def test_device_that_says_something_else_after_its_keys_is_not_heard_twice() -> None:
    lab = MaskedRun(rounds=1)
    lab.runner.tick()
    name, order = next((n, b) for n, b in lab.log if isinstance(b, Order))
    lab.deliver()
    other = DeviceMasking(
        order, tenant="t", fleet="f", device=name, key=lab.masked[name].key, random=random.Random(9).randbytes
    )
    lab.runner.on_masking(name, other.keys())
    lab.run()
    assert lab.states() == ["done"]


def test_unmasked_update_is_refused_in_a_masked_round() -> None:
    lab = MaskedRun(rounds=1)
    lab.runner.tick()
    while not any(isinstance(body, MaskInbox) for _, body in lab.messages):
        lab.deliver()
        lab.runner.tick()
    lab.messages.clear()
    order, other = lab.order_of("d00"), lab.order_of("d01")
    plain = lab.devices["d00"].update(order)
    receipt = lab.send_up("d00", lab.devices["d00"].message(plain, order))
    assert (receipt.verdict, receipt.reason) == ("refused", "wrong_codec")
    ring = ring_of(lab.terms(other))
    short = lab.devices["d01"].update(other, num_examples=1, codec=ring.name, payload=b"1234", buffers=b"")
    receipt = lab.send_up("d01", lab.devices["d01"].message(short, other))
    assert (receipt.verdict, receipt.reason) == ("refused", "wrong_size")


def test_update_before_the_shares_does_not_count() -> None:
    lab = MaskedRun(rounds=1)
    lab.runner.tick()
    order = lab.order_of("d00")
    device = lab.devices["d00"]
    receipt = lab.send_up("d00", device.message(device.update(order), order))
    assert (receipt.verdict, receipt.reason) == ("refused", "round_closed")


def test_round_is_not_opened_with_too_few_for_the_drop_out() -> None:
    lab = MaskedRun(devices=3, dropout=0.49, rounds=1)
    lab.runner.tick()
    assert not lab.rows(schema.rounds)


def test_model_with_buffers_cannot_be_masked() -> None:
    with pytest.raises(ConfigurationError, match="buffers"):
        MaskedRun(buffers=4)


@pytest.mark.parametrize("name", ["FedMedian", "Krum"])
def test_strategy_that_needs_single_updates_is_refused(name: str) -> None:
    rules = masking_rules("pairwise", 0.2, 0.1)
    with pytest.raises(ConfigurationError, match="single updates"):
        check_setup(rules, build_strategy(name, {}), has_app=False, is_central=False)


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
def test_what_does_not_go_with_masks_is_refused(flags: tuple[bool, bool]) -> None:
    strategy = build_strategy("FedAvg", {})
    with pytest.raises(ConfigurationError):
        check_setup(masking_rules("pairwise", 0.2, 0.1), strategy, has_app=flags[0], is_central=flags[1])
    check_setup(None, strategy, has_app=flags[0], is_central=flags[1])
    check_setup(masking_rules("pairwise", 0.2, 0.1), strategy, has_app=False, is_central=False)


def test_lab_encodes_what_it_says() -> None:
    """The oracle itself: noise and clipping follow from names, and terms without masks are refused."""
    lab = MaskedRun(rounds=1)
    lab.runner.tick()
    order = lab.first_order()
    device = lab.masked["d00"]
    assert np.array_equal(device.clipped(order), device.clipped(order))
    assert rng_of("a").integers(9) == rng_of("a").integers(9)
    with pytest.raises(MessageError):
        DeviceMasking(
            msgspec.structs.replace(order, masking=None), tenant="t", fleet="f", device="d00", key=device.key,
            random=bytes,
        )  # fmt: skip
    assert replace(lab.plan, run="other").run == "other"
