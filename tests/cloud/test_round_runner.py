"""Whole runs on a virtual clock: rounds fold, restarts change nothing, bad replies and lost devices end nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud_server.db import schema
from cloud_server.rounds.ports import Candidate, Decision
from cloud_server.rounds.state import Phase
from cloud_server.screening import Refusal
from tests.cloud.round_lab import BlownFuseError, Device, Lab, Message
from tests.cloud.test_strategies import ALL
from wire.cbor import encode_canonical
from wire.checkpoint import Checkpoint
from wire.codec import decode, encode
from wire.errors import BundleError, ConfigurationError, RoundError, StorageError
from wire.messages import Join, Order, TrainConfig, Update, encode_body

# ---- a good round ------------------------------------------------------------------------------------------


def folded_by_hand(lab: Lab, base: np.ndarray[Any, Any], names: list[str]) -> np.ndarray[Any, Any]:
    """The weighted mean of the updates of round 1, in float64."""
    orders = {name: order for name, order in lab.orders if order.kind == "train" and order.round_number == 1}
    updates = [lab.devices[name].update(orders[name]) for name in names]
    vectors = np.stack([decode(u.payload, u.codec, u.params_size) for u in updates]).astype(np.float64)
    weights = np.array([u.num_examples for u in updates], np.float64)
    mean: np.ndarray[Any, Any] = base + (weights[:, None] * vectors).sum(0) / weights.sum()
    return mean


def test_round_folds_the_exact_weighted_mean() -> None:
    lab = Lab(4, rounds=1)
    head = lab.run()
    expected = folded_by_hand(lab, lab.initial.params, list(lab.devices))
    np.testing.assert_allclose(head.params, expected, rtol=0, atol=1e-7)


def test_every_update_ends_in_one_state_and_one_receipt() -> None:
    lab = Lab(4, rounds=3)
    lab.run()
    rows = lab.rows(schema.updates)
    assert Counter((row.kind, row.state) for row in rows) == {
        ("train", "folded"): 12,
        ("evaluate", "folded"): 12,
    }
    assert all(row.body is None and row.artefact_key is None for row in rows)
    assert {row.state for row in lab.rows(schema.orders)} == {"answered"}
    receipts = [receipt for device in lab.devices.values() for receipt in device.receipts]
    assert Counter(receipt.verdict for receipt in receipts) == {"stored": 24}
    assert {receipt.update_id.hex() for receipt in receipts} == {row.update_id for row in rows}


def test_books_tell_the_whole_run() -> None:
    lab = Lab(3, rounds=2)
    lab.run()
    rounds = lab.rows(schema.rounds)
    assert [(row.number, row.state) for row in rounds] == [(1, "done"), (2, "done")]
    assert rounds[0].base_sha256 == lab.initial.sha256.hex()
    assert rounds[1].base_sha256 == rounds[0].head_sha256
    assert rounds[1].head_sha256 == lab.runner.head.sha256.hex()
    assert rounds[1].metrics["accuracy"] == pytest.approx(lab.candidates[2].metrics["accuracy"])
    assert {row.sha256 for row in lab.rows(schema.checkpoints)} == {
        lab.initial.sha256.hex(),
        rounds[0].head_sha256,
        rounds[1].head_sha256,
    }
    assert lab.rows(schema.runs)[0].status == "finished"
    assert [invitation.open for invitation in lab.invitations] == [True, True, True, True, False]


def test_same_seed_gives_the_same_head_and_another_seed_other_orders() -> None:
    one, two, other = Lab(4, seed=7), Lab(4, seed=7), Lab(4, seed=8)
    assert one.run().sha256 == two.run().sha256
    other.run()
    assert {order.order_id for _, order in one.orders} == {order.order_id for _, order in two.orders}
    assert not {order.order_id for _, order in one.orders} & {order.order_id for _, order in other.orders}


def test_order_of_arrival_does_not_change_the_head() -> None:
    lab, backwards = Lab(6, rounds=1), Lab(6, rounds=1)
    lab.run()
    backwards.runner.tick()
    backwards.inbox.reverse()
    assert backwards.run().sha256 == lab.runner.head.sha256


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_strategy_runs_two_rounds_through_the_runner(name: str) -> None:
    lab = Lab(11, strategy=name, parameters=ALL[name], rounds=2)
    head = lab.run()
    assert np.isfinite(head.params).all()
    assert head.sha256 != lab.initial.sha256
    assert {row.state for row in lab.rows(schema.updates)} == {"folded"}


def test_strategy_changes_what_devices_are_told() -> None:
    lab = Lab(3, strategy="FedProx", parameters={"proximal_mu": 0.25}, rounds=1)
    lab.run()
    assert lab.invitations[0].train.proximal_mu == 0.25
    private = "DifferentialPrivacyClientSideFixedClipping"
    lab = Lab(11, strategy=private, parameters=ALL[private], rounds=1)
    lab.run()
    assert lab.invitations[0].train.clipping_norm == 1.0


def test_buffers_are_averaged() -> None:
    lab = Lab(3, buffers=4, rounds=1)
    head = lab.run()
    sent = [lab.devices[name].update(order) for name, order in lab.orders if order.kind == "train"]
    values = np.stack([np.frombuffer(update.buffers, "<f2").astype(np.float64) for update in sent])
    weights = np.array([update.num_examples for update in sent])
    np.testing.assert_allclose(head.buffers, (weights[:, None] * values).sum(0) / weights.sum(), atol=1e-6)


def test_large_updates_go_through_the_artefact_store(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Lab(3).run()
    monkeypatch.setattr("cloud_server.rounds.intake.INLINE_BYTES", 10)
    lab = Lab(3)
    assert lab.run().sha256 == small.sha256
    assert list(lab.blobs.keys("blobs")) == sorted(lab.blobs.keys("blobs"))
    kept = {key.rsplit("/", 1)[1] for key in lab.blobs.keys("blobs")}
    assert kept == {row.sha256 for row in lab.rows(schema.checkpoints)}


# ---- bad replies -------------------------------------------------------------------------------------------


def spoil(value: float) -> Callable[[Device, Order], Message]:
    def behave(device: Device, order: Order) -> Message:
        update = device.update(order)
        payload = update.payload[: -4 * update.params_size]
        vector = np.full(update.params_size, value, "<f4")
        return device.message(msgspec.structs.replace(update, payload=payload + vector.tobytes()), order)

    return behave


def changed(**changes: Any) -> Callable[[Device, Order], Message]:
    return lambda device, order: device.message(device.update(order, **changes), order)


def of_size(change: int) -> Callable[[Device, Order], Message]:
    def behave(device: Device, order: Order) -> Message:
        vector = np.zeros(device.lab.plan.manifest.params_size + change, np.float32)
        return device.message(device.update(order, vector), order)

    return behave


def rebodied(body: bytes) -> Callable[[Device, Order], Message]:
    return lambda device, order: replace(device.honest(order), body=body)


KILLERS: dict[str, tuple[Callable[[Device, Order], Any], Refusal]] = {
    "nan": (spoil(math.nan), Refusal.NOT_DECODABLE),
    "inf": (spoil(math.inf), Refusal.NOT_DECODABLE),
    "too small": (of_size(-1), Refusal.WRONG_SIZE),
    "too large": (of_size(1), Refusal.WRONG_SIZE),
    "wrong base": (changed(base_sha256=bytes(32)), Refusal.WRONG_BASE),
    "wrong round": (changed(round_number=9), Refusal.WRONG_ROUND),
    "wrong run": (changed(run="autumn"), Refusal.WRONG_ROUND),
    "wrong codec": (changed(codec="sign"), Refusal.WRONG_CODEC),
    "extra buffers": (changed(buffers=bytes(8)), Refusal.WRONG_SIZE),
    "no payload": (changed(payload=b""), Refusal.NOT_DECODABLE),
    "unknown order": (changed(order_id=bytes(16)), Refusal.UNKNOWN_ORDER),
    "not a message": (rebodied(b"\xff"), Refusal.MALFORMED),
    "empty": (rebodied(b""), Refusal.MALFORMED),
}


@pytest.mark.parametrize("killer", KILLERS)
@pytest.mark.parametrize("strategy", ["FedAvg", "FedMedian"])
def test_killer_reply_is_refused_and_the_round_ends_without_it(killer: str, strategy: str) -> None:
    behaviour, refusal = KILLERS[killer]
    codec = TrainConfig(codec="fp32", clipping_norm=100.0)
    lab = Lab(4, rounds=1, strategy=strategy, train=codec)
    lab.devices["d02"].behaviour = behaviour
    head = lab.run()
    receipt = lab.devices["d02"].receipts[0]
    assert (receipt.verdict, receipt.reason) == ("refused", refusal)
    assert np.isfinite(head.params).all()
    assert lab.rows(schema.rounds)[0].metrics["train_devices"] == 3
    if strategy == "FedAvg":
        expected = folded_by_hand(lab, lab.initial.params, ["d00", "d01", "d03"])
        np.testing.assert_allclose(head.params, expected, rtol=0, atol=1e-7)


def test_huge_num_examples_weigh_no_more_than_the_enrolled_cap() -> None:
    lab, honest = Lab(4, rounds=1), Lab(4, rounds=1)
    lab.devices["d02"].behaviour = changed(num_examples=2**31)
    honest.devices["d02"].behaviour = changed(num_examples=honest.max_examples("d02"))
    assert lab.run().sha256 == honest.run().sha256


def test_absurd_num_examples_are_no_message_at_all() -> None:
    def behave(device: Device, order: Order) -> Message:
        message = device.honest(order)
        plain = msgspec.to_builtins(device.update(order), builtin_types=(bytes,))
        return replace(message, body=encode_canonical({**plain, "num_examples": 10**15}))

    lab = Lab(4, rounds=1)
    lab.devices["d02"].behaviour = behave
    lab.run()
    assert lab.devices["d02"].receipts[0].reason == Refusal.MALFORMED


def test_boosted_update_is_clipped_to_the_rounds_norm() -> None:
    def boost(device: Device, order: Order) -> Message:
        return device.message(device.update(order, device.local_update(order) * np.float32(1e6)), order)

    lab = Lab(4, rounds=1, train=TrainConfig(codec="int8", clipping_norm=2.0))
    lab.devices["d02"].behaviour = boost
    head = lab.run()
    assert np.linalg.norm(head.params - lab.initial.params) <= 2.0 * (1 + 1e-5)


def test_boosted_update_is_clipped_to_the_running_median_of_the_rounds_before() -> None:
    def boost(device: Device, order: Order) -> Message:
        factor = np.float32(1.0 if order.round_number < 3 else 1e4)
        vector = device.local_update(order) * factor
        return device.message(device.update(order, vector), order)

    def quiet(rounds: int) -> Lab:
        return Lab(4, rounds=rounds, evaluate_every=0, train=TrainConfig(codec="fp32", clipping_norm=1e9))

    lab = quiet(3)
    lab.devices["d02"].behaviour = boost
    lab.run()
    rounds, rows = lab.rows(schema.rounds), lab.rows(schema.updates)
    assert "norm_bound" not in rounds[0].config
    medians = []
    for number in (1, 2):
        norms = sorted(row.norm for row in rows if row.round == number)
        assert rounds[number - 1].metrics["update_norm_median"] == norms[1]
        medians.append(norms[1])
    bound = 3.0 * min(medians)
    assert rounds[2].config["norm_bound"] == bound
    (boosted,) = (row for row in rows if row.round == 3 and row.device == "d02")
    assert boosted.norm > 1000 * bound
    assert boosted.state == "folded"
    head = lab.runner.head.params
    before = lab.head(bytes.fromhex(rounds[2].base_sha256)).params
    assert np.linalg.norm(head - before) <= bound * (1 + 1e-5)


def test_running_median_is_the_same_after_a_restart_before_every_turn() -> None:
    options: dict[str, Any] = {"rounds": 4, "train": TrainConfig(codec="int8", clipping_norm=1e6)}

    def boost(device: Device, order: Order) -> Message:
        vector = device.local_update(order) * np.float32(order.round_number**4)
        if order.kind == "evaluate":
            return device.honest(order)
        return device.message(device.update(order, vector), order)

    def boosted() -> Lab:
        lab = Lab(5, **options)
        lab.devices["d01"].behaviour = boost
        return lab

    expected, lab = boosted().run().sha256, boosted()
    for _ in range(400):
        if lab.runner.is_finished:
            break
        lab.step()
        lab.restart()
    assert lab.runner.head.sha256 == expected
    assert len([row for row in lab.rows(schema.rounds) if "norm_bound" in row.config]) == 3


def test_duplicate_is_acknowledged_again_and_counted_once() -> None:
    lab = Lab(3, rounds=1)
    lab.runner.tick()
    name, order = lab.inbox.popleft()
    message = lab.devices[name].honest(order)
    receipts = [lab.send_up(name, message) for _ in range(3)]
    assert [receipt.verdict for receipt in receipts] == ["stored", "duplicate", "duplicate"]
    lab.devices[name].answers[order.order_id] = message
    lab.run()
    assert Counter(row.device for row in lab.rows(schema.updates))[name] == 2
    np.testing.assert_allclose(
        lab.candidates[1].checkpoint.params,
        folded_by_hand(lab, lab.initial.params, list(lab.devices)),
        rtol=0,
        atol=1e-7,
    )


def test_second_update_for_one_order_is_refused() -> None:
    lab = Lab(3, rounds=1)
    lab.runner.tick()
    name, order = lab.inbox[0]
    device = lab.devices[name]
    assert lab.send_up(name, device.message(device.update(order), order)).verdict == "stored"
    second = device.message(device.update(order, update_id=b"s" * 16), order)
    receipt = lab.send_up(name, second)
    assert (receipt.verdict, receipt.reason) == ("refused", Refusal.ALREADY_ANSWERED)
    assert lab.send_up(name, second).reason == Refusal.ALREADY_ANSWERED


def test_refused_update_is_refused_again_from_the_books() -> None:
    lab = Lab(3, rounds=1)
    lab.runner.tick()
    name, order = lab.inbox[0]
    message = changed(base_sha256=bytes(32))(lab.devices[name], order)
    first = lab.send_up(name, message)
    assert lab.send_up(name, message) == first
    assert [row.reason for row in lab.rows(schema.updates)] == [Refusal.WRONG_BASE]


def test_update_of_one_device_cannot_be_sent_by_another() -> None:
    lab = Lab(3, rounds=1)
    lab.runner.tick()
    name, order = lab.inbox[0]
    message = lab.devices[name].honest(order)
    thief = next(other for other in lab.devices if other != name)
    stolen = lab.send_up(thief, message)
    assert (stolen.verdict, stolen.reason) == ("refused", Refusal.FOREIGN_ORDER)
    # It took neither the order nor the id from its owner, and left nothing in the books.
    assert lab.rows(schema.updates) == []
    assert lab.send_up(name, message).verdict == "stored"


def test_sequence_number_that_was_used_is_refused() -> None:
    lab = Lab(3, rounds=1)
    lab.runner.tick()
    name, order = lab.inbox[0]
    device = lab.devices[name]
    first = device.honest(order)
    assert lab.send_up(name, first).verdict == "stored"
    other = device.update(order, update_id=b"t" * 16)
    receipt = lab.send_up(name, Message(first.header, encode_body(other)))
    assert receipt.reason == Refusal.REPLAYED


def test_update_overtaken_by_many_messages_is_late_and_not_forged() -> None:
    lab = Lab(3, rounds=1)
    lab.runner.tick()
    name, order = lab.inbox[0]
    device = lab.devices[name]
    message = device.honest(order)
    for number in range(100):
        stray = device.update(
            order, order_id=number.to_bytes(16, "big"), update_id=number.to_bytes(16, "big")
        )
        assert lab.send_up(name, device.message(stray, order)).reason == Refusal.UNKNOWN_ORDER
    assert lab.send_up(name, message).verdict == "stored"


def test_update_for_another_model_is_refused() -> None:
    lab = Lab(3, rounds=1)
    lab.runner.tick()
    name, order = lab.inbox[0]
    message = lab.devices[name].honest(order)
    header = msgspec.structs.replace(message.header, schema=b"x" * 32)
    assert lab.send_up(name, replace(message, header=header)).reason == Refusal.WRONG_MODEL


def test_update_after_its_round_closed_is_late() -> None:
    lab = Lab(4, rounds=2, goal=3)
    lab.devices["d03"].behaviour = lambda device, order: None
    lab.run()
    order = next(order for name, order in lab.orders if name == "d03")
    receipt = lab.send_up("d03", lab.devices["d03"].honest(order))
    assert (receipt.verdict, receipt.reason) == ("refused", Refusal.ROUND_CLOSED)
    late = [row for row in lab.rows(schema.updates) if row.state == "late"]
    assert [row.device for row in late] == ["d03"]


# ---- devices that do not answer ----------------------------------------------------------------------------


def test_declined_and_lost_devices_are_not_waited_for() -> None:
    lab = Lab(5, rounds=1)
    lab.devices["d01"].behaviour = lambda device, order: Join(order_id=order.order_id, accepted=False)
    lab.devices["d02"].behaviour = lambda device, order: None
    lab.runner.tick()
    lab.deliver()
    lab.leave("d02")
    lab.runner.tick()
    assert lab.runner.phase is Phase.EVALUATING
    assert lab.clock.time == lab.rows(schema.rounds)[0].started


def test_silent_device_ends_at_the_deadline_and_is_asked_again_before() -> None:
    lab = Lab(4, rounds=1)
    lab.devices["d03"].behaviour = lambda device, order: None
    lab.run()
    row = lab.rows(schema.rounds)[0]
    assert row.state == "done"
    assert row.metrics["train_devices"] == 3
    asked = [order.order_id for name, order in lab.orders if name == "d03" and order.kind == "train"]
    assert len(asked) > 1
    assert len(set(asked)) == 1
    states = {order.device: order.state for order in lab.rows(schema.orders) if order.kind == "train"}
    assert states == {"d00": "answered", "d01": "answered", "d02": "answered", "d03": "expired"}


def test_deadline_without_quorum_fails_the_round_and_the_next_goes_on() -> None:
    lab = Lab(4, rounds=1, quorum=3)

    def silent_at_first(device: Device, order: Order) -> Message | None:
        return None if order.round_number == 1 else device.honest(order)

    for name in ("d01", "d02"):
        lab.devices[name].behaviour = silent_at_first
    lab.run()
    rounds = lab.rows(schema.rounds)
    assert [(row.number, row.state) for row in rounds] == [(1, "failed"), (2, "done")]
    assert rounds[0].reason == "2 of 3 updates"
    assert rounds[0].ended - rounds[0].started == 60.0
    assert rounds[1].started - rounds[0].ended == 5.0
    assert rounds[1].base_sha256 == rounds[0].base_sha256
    states = Counter((row.round, row.kind, row.state) for row in lab.rows(schema.updates))
    assert states[1, "train", "discarded"] == 2
    assert states[2, "train", "folded"] == 4


def test_back_off_after_failures_goes_on_over_a_restart() -> None:
    lab = Lab(3, rounds=1, quorum=3)
    lab.devices["d01"].behaviour = lambda device, order: Join(order_id=order.order_id, accepted=False)
    while lab.runner.view().failures < 2:
        lab.step()
    due = lab.rows(schema.rounds)[-1].ended + 10.0
    lab.clock.time = due - 1.0
    lab.restart()
    lab.runner.tick()
    assert lab.runner.phase is Phase.IDLE
    assert lab.runner.next_tick == due


def test_failed_round_leaves_the_strategy_as_it_was() -> None:
    """FedAdam would otherwise carry the moments of a round that never was."""

    def silent_at_first(device: Device, order: Order) -> Message | None:
        return None if order.round_number == 2 else device.honest(order)

    lab = Lab(3, strategy="FedAdam", rounds=2, quorum=3)
    lab.devices["d01"].behaviour = silent_at_first
    lab.run()
    assert [row.state for row in lab.rows(schema.rounds)] == ["done", "failed", "done"]
    assert {row.round for row in lab.rows(schema.strategy_state)} == {3}


def test_run_waits_for_its_quorum_and_opens_when_it_comes() -> None:
    lab = Lab(3, rounds=1, quorum=3)
    lab.absent |= {"d00"}
    lab.restart()
    assert lab.runner.tick() == math.inf
    assert lab.runner.phase is Phase.IDLE
    lab.come_back("d00")
    lab.run()
    assert lab.runner.is_finished


def test_more_nodes_wanted_by_the_strategy_than_there_are_only_backs_off() -> None:
    lab = Lab(3, parameters={"min_available_nodes": 5})
    started = lab.clock.time
    assert lab.runner.tick() == started + 5.0
    assert lab.rows(schema.rounds) == []


def test_devices_lost_before_the_quorum_may_come_back() -> None:
    lab = Lab(3, rounds=1)
    lab.runner.tick()
    for name in list(lab.devices):
        lab.leave(name)
    lab.runner.tick()
    assert lab.runner.phase is Phase.TRAINING
    lab.inbox.clear()
    for name in list(lab.devices):
        lab.come_back(name)
    lab.run()
    assert lab.rows(schema.rounds)[0].metrics["train_devices"] == 3


def test_nobody_who_evaluates_still_gives_a_decision() -> None:
    lab = Lab(3, rounds=1)

    def trains_only(device: Device, order: Order) -> Message | Join:
        if order.kind == "evaluate":
            return Join(order_id=order.order_id, accepted=False, reason="no labels")
        return device.honest(order)

    for device in lab.devices.values():
        device.behaviour = trains_only
    lab.run()
    assert lab.candidates[1].devices == 0
    assert lab.candidates[1].metrics == {}


# ---- bounds ------------------------------------------------------------------------------------------------


def test_head_that_leaves_its_bound_fails_the_round() -> None:
    lab = Lab(3, rounds=1)
    lab.plan = replace(lab.plan, max_head_change=0.5)
    lab.restart()
    for _ in range(20):
        lab.step()
    first = lab.rows(schema.rounds)[0]
    assert first.state == "failed"
    assert "the head would move by" in first.reason
    assert lab.runner.head.sha256 == lab.initial.sha256


def test_refinement_that_fails_fails_the_round_and_not_the_run() -> None:
    class Broken(Lab):
        def finish(self, params: Any, buffers: Any, base: Checkpoint) -> Checkpoint:
            if not self.runner.view().failures:
                raise RoundError("no ranges")
            return super().finish(params, buffers, base)

    lab = Broken(3, rounds=1)
    lab.run()
    assert [row.state for row in lab.rows(schema.rounds)] == ["failed", "done"]


def test_held_candidate_is_the_base_of_the_next_round() -> None:
    class Strict(Lab):
        def decide(self, candidate: Candidate) -> Decision:
            super().decide(candidate)
            return Decision(reason="no_gain")

    lab = Strict(3, rounds=2)
    lab.run()
    rounds = lab.rows(schema.rounds)
    assert [row.reason for row in rounds] == ["no_gain", "no_gain"]
    assert rounds[1].base_sha256 == rounds[0].head_sha256


# ---- pausing, beginning, ending ----------------------------------------------------------------------------


def test_paused_run_stays_paused_over_a_restart() -> None:
    lab = Lab(3, rounds=2)
    lab.runner.set_paused(True)
    lab.runner.tick()
    lab.restart()
    assert lab.runner.tick() == math.inf
    lab.runner.set_paused(False)
    lab.run()
    assert lab.runner.view().moved == 2


def test_held_run_opens_no_round_whatever_an_operator_resumes_and_a_restart_forgets_it() -> None:
    lab = Lab(3, rounds=2)
    lab.runner.hold(True)
    assert lab.runner.tick() == math.inf
    lab.runner.set_paused(False)
    assert lab.runner.tick() == math.inf
    lab.runner.set_paused(True)
    lab.runner.hold(False)
    assert lab.runner.tick() == math.inf, "the operator has paused it meanwhile"
    lab.runner.set_paused(False)
    lab.runner.hold(True)
    lab.restart()
    lab.run()
    assert lab.runner.view().moved == 2


def test_finished_run_does_nothing_after_a_restart() -> None:
    lab = Lab(3, rounds=1)
    head = lab.run()
    lab.restart()
    lab.runner.tick()
    assert lab.runner.is_finished
    assert lab.runner.head.sha256 == head.sha256
    assert len(lab.rows(schema.rounds)) == 1


def test_finished_run_goes_on_when_it_gets_more_rounds() -> None:
    lab = Lab(3, rounds=1)
    lab.run()
    lab.plan = replace(lab.plan, policy=replace(lab.plan.policy, rounds=2))
    lab.restart()
    lab.run()
    assert lab.runner.view().moved == 2


def test_run_of_another_model_is_refused() -> None:
    lab = Lab(3, buffers=2)
    other = Lab(3)
    lab.run()
    lab.plan = other.plan
    with pytest.raises(ConfigurationError) as caught:
        lab.restart()
    assert "name" in caught.value.hint


def test_initial_head_of_another_model_is_refused() -> None:
    lab = Lab(3)
    with lab.database.transaction() as connection:
        connection.execute(schema.checkpoints.delete())
        connection.execute(schema.runs.delete())
    lab.initial = Checkpoint(
        params=np.zeros(3, np.float32), buffers=np.zeros(0, np.float32), ranges=np.zeros((0, 2), np.float32)
    )
    with pytest.raises(BundleError):
        lab.restart()


# ---- restarts ----------------------------------------------------------------------------------------------


def run_through_crashes(lab: Lab) -> int:
    """Runs to the end, with a new process after each blown fuse; returns how many there were."""
    crashes = 0
    for _ in range(400):
        if lab.runner.is_finished:
            return crashes
        try:
            lab.step()
        except BlownFuseError:
            crashes += 1
            lab.restart()
    raise AssertionError(f"not finished: {lab.runner.view()}")


def crash_lab(strategy: str, devices: int = 3) -> Lab:
    return Lab(devices, strategy=strategy, rounds=2, quorum=2)


@pytest.mark.parametrize(
    ("strategy", "devices"),
    [
        ("FedAdam", 2),
        pytest.param("FedAvg", 4, marks=pytest.mark.slow),
        pytest.param("FedMedian", 4, marks=pytest.mark.slow),
    ],
)
def test_crash_at_any_commit_send_or_decision_gives_the_same_parameters(strategy: str, devices: int) -> None:
    undisturbed = crash_lab(strategy, devices)
    undisturbed.fuse.steps.clear()
    expected = undisturbed.run().sha256
    steps = list(undisturbed.fuse.steps)
    assert steps.count("after commit") >= 18
    for at, what in enumerate(steps):
        lab = crash_lab(strategy, devices)
        lab.fuse.steps.clear()
        lab.fuse.at = at
        assert run_through_crashes(lab) == 1, f"step {at} ({what}) was not reached"
        assert lab.runner.head.sha256 == expected, f"crash at step {at} ({what})"
        counted = Counter((row.kind, row.state) for row in lab.rows(schema.updates))
        each = 2 * devices
        assert counted == {("train", "folded"): each, ("evaluate", "folded"): each}, f"step {at} ({what})"


def test_restart_before_every_turn_gives_the_same_parameters() -> None:
    expected = crash_lab("FedAvgM").run().sha256
    lab = crash_lab("FedAvgM")
    for _ in range(400):
        if lab.runner.is_finished:
            break
        lab.step()
        lab.restart()
    assert lab.runner.head.sha256 == expected


def test_restart_with_a_partly_present_fleet_still_folds_what_was_promised() -> None:
    """Ten of sixteen have answered when the process ends; the fleet is heard of again one by one."""
    expected = Lab(8, rounds=1).run().sha256
    lab = Lab(8, rounds=1)
    lab.runner.tick()
    for _ in range(5):
        name, order = lab.inbox.popleft()
        lab.feed(name, order, lab.devices[name].honest(order))
    everybody = set(lab.devices)
    lab.absent = set(everybody)
    lab.restart()
    lab.runner.tick()
    lab.inbox = type(lab.inbox)(item for item in lab.inbox if item[0] not in {f"d{i:02d}" for i in range(5)})
    for name in sorted(everybody):
        lab.come_back(name)
        lab.runner.tick()
        assert lab.runner.phase is Phase.TRAINING
    lab.run()
    assert lab.candidates[1].checkpoint.sha256 == expected


def test_stale_process_cannot_commit() -> None:
    lab = Lab(3)
    fence = lab.database.claim_writer()
    lab.database.claim_writer()
    with pytest.raises(StorageError, match="taken over"), lab.database.transaction(fence=fence):
        pass


def test_metrics_of_updates_reach_the_books() -> None:
    lab = Lab(3, rounds=1)
    lab.run()
    metrics = lab.rows(schema.rounds)[0].metrics
    assert metrics["loss_first"] == pytest.approx(1.5)
    assert metrics["train_devices"] == 3
    assert lab.runner.view().metrics == metrics


def test_update_survives_its_codec() -> None:
    """The lab's devices send what they compute: the harness itself must not lose anything."""
    lab = Lab(2, rounds=1)
    lab.runner.tick()
    name, order = lab.inbox[0]
    device = lab.devices[name]
    update: Update = device.update(order)
    vector = decode(update.payload, update.codec, update.params_size)
    np.testing.assert_allclose(vector, device.local_update(order), atol=0.02)
    assert encode(vector, "fp32", np.random.default_rng(0))
