"""Buffered rounds: updates of older heads count by staleness, once, whatever instruction the process ends at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from cloud_server.db import schema
from cloud_server.db.carried import staleness
from cloud_server.db.overview import show_round
from cloud_server.rounds.buffered import BufferedPerformer, check_buffered
from cloud_server.rounds.runner import RoundRunner
from cloud_server.rounds.state import Phase, RoundPolicy
from cloud_server.screening import Refusal
from tests.cloud.round_lab import RUN, BlownFuseError, Device, Lab
from wire.checkpoint import Checkpoint
from wire.codec import decode
from wire.errors import ConfigurationError
from wire.messages import Join, Order, Receipt, Update

SLOW = "d04"
QUICK = ("d00", "d01", "d02", "d03")


def buffered(devices: int = 5, **policy: Any) -> Lab:
    rules = {"mode": "buffered", "goal": 4, "rounds": 3, "evaluate_every": 0, **policy}
    return Lab(devices, make_runner=partial(RoundRunner, make_desk=BufferedPerformer), **rules)


def at_work(device: Device, order: Order) -> Join:
    """Accepts, and is not done before `finish`."""
    return Join(order_id=order.order_id, accepted=True)


def order_of(lab: Lab, name: str, number: int) -> Order:
    return next(
        order
        for device, order in lab.orders
        if (device, order.kind, order.round_number) == (name, "train", number)
    )


def finish(lab: Lab, name: str, number: int) -> Receipt:
    device = lab.devices[name]
    return lab.send_up(name, device.honest(order_of(lab, name, number)))


def play_until(lab: Lab, is_there: Callable[[Lab], bool]) -> None:
    for _ in range(200):
        if is_there(lab):
            return
        lab.step()
    raise AssertionError(f"never there: {lab.runner.view()}")


def is_folded(number: int) -> Callable[[Lab], bool]:
    return lambda lab: lab.runner.view().moved >= number


def with_slow(lab: Lab) -> Lab:
    lab.devices[SLOW].behaviour = at_work
    return lab


def by_hand(lab: Lab, base: Checkpoint, replies: list[tuple[str, int, float]]) -> np.ndarray[Any, Any]:
    """Base + the weighted mean of the scaled updates of (device, asked in, factor), in float64."""
    found: list[tuple[Update, float]] = [
        (lab.devices[name].update(order_of(lab, name, asked)), factor) for name, asked, factor in replies
    ]
    vectors = [decode(each.payload, each.codec, each.params_size).astype(np.float64) * f for each, f in found]
    weights = np.array([each.num_examples for each, _ in found], np.float64)
    mean: np.ndarray[Any, Any] = base.params + (weights[:, None] * np.stack(vectors)).sum(0) / weights.sum()
    return mean


# ---- what counts -------------------------------------------------------------------------------------------


def test_stale_update_counts_once_by_its_staleness() -> None:
    lab = with_slow(buffered(rounds=3))
    play_until(lab, is_folded(2))
    base = lab.runner.head
    lab.runner.tick()
    assert (lab.runner.phase, lab.runner.view().cohort) == (Phase.TRAINING, 5)
    receipt = finish(lab, SLOW, 1)
    assert receipt.verdict == "stored"
    assert finish_again(lab, SLOW, 1) == "duplicate"
    head = lab.run()
    quick = [name for name in QUICK if any(row.device == name for row in rows_of(lab, 3))]
    replies = [(SLOW, 1, 3.0**-0.5), *((name, 3, 1.0) for name in quick)]
    assert len(replies) >= 4
    np.testing.assert_allclose(head.params, by_hand(lab, base, replies), rtol=0, atol=1e-6)
    ends = Counter((row.device, row.state) for row in lab.rows(schema.updates) if row.device == SLOW)
    assert ends == {(SLOW, "folded"): 1}


def rows_of(lab: Lab, number: int) -> list[Any]:
    return [row for row in lab.rows(schema.updates) if row.round == number]


def finish_again(lab: Lab, name: str, number: int) -> str:
    """The same update under the next number, as after a lost receipt."""
    return finish(lab, name, number).verdict


def test_books_tell_the_base_and_the_staleness_of_each_update() -> None:
    lab = with_slow(buffered(rounds=3))
    play_until(lab, is_folded(2))
    lab.runner.tick()
    finish(lab, SLOW, 1)
    lab.run()
    with lab.database.read() as connection:
        facts = show_round(connection, RUN, 3)
    assert facts is not None
    mine = next(each for each in facts["updates"] if each["device"] == SLOW)
    assert (mine["staleness"], mine["asked_in"], mine["base_sha256"]) == (2, 1, lab.initial.sha256.hex())
    assert facts["metrics"]["staleness_max"] == 2.0
    assert facts["metrics"]["staleness_mean"] == 2.0 / len(facts["updates"])
    entry = next(
        body
        for body in (json.loads(row.body) for row in lab.rows(schema.audit) if row.kind == "round.folded")
        if body["round"] == 3
    )
    told = {reply["device"]: (reply["base"], reply["staleness"]) for reply in entry["replies"]}
    assert told[SLOW] == (lab.initial.sha256.hex(), 2)
    assert {stale for _, stale in told.values()} == {0, 2}


def test_update_between_two_rounds_waits_in_the_buffer() -> None:
    lab = with_slow(buffered(rounds=2, evaluate_every=1, pause_seconds=30.0))
    play_until(lab, lambda lab: lab.runner.phase is Phase.EVALUATING)
    # Who is at work is not asked to evaluate.
    assert lab.runner.view().cohort == 4
    assert finish(lab, SLOW, 1).verdict == "stored"
    assert [row.round for row in lab.rows(schema.updates) if row.device == SLOW] == [2]
    play_until(lab, lambda lab: lab.runner.view().round_number == 2)
    # It has its voice in this round, so it gets its next order in the one after.
    assert not [1 for name, order in lab.orders if (name, order.round_number) == (SLOW, 2)]
    lab.run()
    assert {row.state for row in lab.rows(schema.updates) if row.device == SLOW} == {"folded"}


def test_too_stale_update_is_refused_by_name_and_its_device_is_free_again() -> None:
    lab = with_slow(buffered(rounds=4, max_staleness=1))
    play_until(lab, is_folded(2))
    receipt = finish(lab, SLOW, 1)
    assert (receipt.verdict, receipt.reason) == ("refused", Refusal.TOO_STALE)
    assert [(row.state, row.reason) for row in lab.rows(schema.updates) if row.device == SLOW] == [
        ("late", "too_stale")
    ]
    lab.devices[SLOW].behaviour = None
    lab.run()
    assert {row.round for row in lab.rows(schema.updates) if (row.device, row.state) == (SLOW, "folded")}


def test_order_that_nobody_accepted_ends_with_its_round() -> None:
    lab = buffered(rounds=2)
    lab.devices[SLOW].behaviour = lambda device, order: None
    play_until(lab, is_folded(1))
    assert finish(lab, SLOW, 1).reason == Refusal.ROUND_CLOSED


def test_declined_order_frees_its_device() -> None:
    lab = with_slow(buffered(rounds=3))
    play_until(lab, is_folded(1))
    lab.devices[SLOW].behaviour = None
    lab.runner.on_join(
        SLOW, Join(order_id=order_of(lab, SLOW, 1).order_id, accepted=False, reason="restarted")
    )
    play_until(lab, is_folded(2))
    assert order_of(lab, SLOW, 2)


def test_buffer_outlives_a_round_without_a_quorum() -> None:
    lab = buffered(rounds=1, quorum=3, goal=4)
    for name in ("d01", "d02", "d03", "d04"):
        lab.devices[name].behaviour = at_work
    play_until(lab, lambda lab: lab.runner.view().failures == 1)
    assert [(row.device, row.state, row.round) for row in lab.rows(schema.updates)] == [("d00", "stored", 2)]
    finish(lab, "d01", 1)
    finish(lab, "d02", 1)
    finish(lab, "d03", 1)
    lab.run()
    assert {(row.device, row.state, row.round) for row in lab.rows(schema.updates)} == {
        (name, "folded", 2) for name in ("d00", "d01", "d02", "d03")
    }


def test_what_is_left_when_a_run_ends_is_discarded_and_late() -> None:
    lab = with_slow(buffered(rounds=1, evaluate_every=1))
    play_until(lab, lambda lab: lab.runner.phase is Phase.EVALUATING)
    assert finish(lab, SLOW, 1).verdict == "stored"
    lab.run()
    row = next(row for row in lab.rows(schema.updates) if row.device == SLOW)
    assert (row.state, row.reason, row.body) == ("discarded", "run_finished", None)


def test_run_that_becomes_synchronous_folds_its_own_base_only() -> None:
    lab = with_slow(buffered(rounds=2, pause_seconds=30.0))
    play_until(lab, is_folded(1))
    finish(lab, SLOW, 1)
    lab._make_runner = RoundRunner
    lab.restart()
    lab.devices[SLOW].behaviour = None
    lab.run()
    mine = {(row.round, row.state, row.reason) for row in lab.rows(schema.updates) if row.device == SLOW}
    assert (2, "discarded", "not_buffered") in mine


# ---- crashes -----------------------------------------------------------------------------------------------


def slow_run(at: int = -1) -> Lab:
    """A buffered run whose slow devices answer a round late; the process ends once, at step `at`."""
    lab = buffered(4, rounds=3, goal=2, evaluate_every=2)
    for name in ("d02", "d03"):
        lab.devices[name].behaviour = at_work
    lab.fuse.steps.clear()
    lab.fuse.at = at
    owed: dict[str, int] = {}

    def play() -> None:
        for _ in range(300):
            if lab.runner.is_finished:
                return
            lab.step()
            for name, order in list(lab.orders):
                if lab.devices[name].behaviour is at_work and order.kind == "train":
                    owed.setdefault(name, order.round_number)
            for name, number in owed.items():
                if lab.runner.view().moved >= number and name not in answered:
                    answered.add(name)
                    try:
                        finish(lab, name, number)
                    except BlownFuseError:
                        answered.discard(name)
                        raise
        raise AssertionError(f"not finished: {lab.runner.view()}")

    answered: set[str] = set()
    try:
        play()
    except BlownFuseError:
        lab.restart()
        play()
    return lab


@pytest.mark.parametrize("stride", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_process_may_end_at_any_step_of_a_buffered_run(stride: int) -> None:
    whole = slow_run()
    steps = len(whole.fuse.steps)
    stale = [row for row in whole.rows(schema.updates) if row.device in ("d02", "d03")]
    assert {row.state for row in stale} == {"folded"}
    for at in range(stride // 2, steps, stride):
        lab = slow_run(at)
        rows = [row for row in lab.rows(schema.updates) if row.kind == "train"]
        assert {row.state for row in rows} <= {"folded", "late", "discarded"}, at
        assert len({row.order_id for row in rows}) == len(rows), at
        voices = Counter((row.round, row.device) for row in rows if row.state == "folded")
        assert set(voices.values()) == {1}, at
        assert {row.device for row in rows if row.state == "folded"} >= {"d00", "d01"}, at


# ---- what does not go together -----------------------------------------------------------------------------


def test_staleness_counts_the_heads_in_between() -> None:
    moved = [1, 2, 4]
    assert [staleness(moved, 1, number) for number in (1, 2, 3, 4, 5)] == [0, 1, 2, 2, 3]
    assert staleness(moved, 3, 4) == 0


def test_buffered_rounds_need_a_goal() -> None:
    with pytest.raises(ConfigurationError) as caught:
        RoundPolicy(mode="buffered")
    assert "goal" in str(caught.value)
    assert "tenth" in caught.value.hint


@pytest.mark.parametrize("what", ["is_private", "is_adding_noise", "has_app", "needs_reference", "secure"])
def test_what_needs_one_base_is_refused_with_a_hint(what: str) -> None:
    asked = dict.fromkeys(("is_private", "is_adding_noise", "has_app", "needs_reference"), False)
    policy = RoundPolicy(mode="buffered", goal=2)
    check_buffered(policy, **asked)
    if what == "secure":
        policy = RoundPolicy(mode="buffered", goal=2, secure="pairwise")
    else:
        asked[what] = True
    with pytest.raises(ConfigurationError) as caught:
        check_buffered(policy, **asked)
    assert "run.mode to sync" in caught.value.hint
    check_buffered(RoundPolicy(secure=policy.secure), **asked)
