"""A stock ServerApp whose aggregator is killed: played back against its record, or told what differs."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from cloud_server.db import schema
from cloud_server.db.grid_steps import BEGIN, GridStep, begin_anew
from cloud_server.flower.tape import NODES, PULL, PUSH, Tape
from tests.cloud.app_lab import (
    PATIENCE_SECONDS,
    AppLab,
    Main,
    app_labs,
    fed_avg,
    flat,
    initial_arrays,
    start_params,
    training,
)
from tests.cloud.round_lab import RUN, START
from wire.codec import decode
from wire.errors import RoundError


@pytest.fixture
def make_lab() -> Iterator[Callable[..., AppLab]]:
    with app_labs() as make:
        yield make


def run_with_restarts(lab: AppLab, at: list[int]) -> None:
    """A new process whenever so many replies are in the books."""
    left = list(at)
    while left:
        lab.step()
        if len(lab.rows(schema.updates)) >= left[0]:
            del left[0]
            assert not lab.runner.is_finished
            lab.crash()
    lab.run()


@pytest.mark.parametrize("at", [[3, 8, 9], [16]])
def test_app_goes_on_after_restarts_with_the_same_result(
    at: list[int], make_lab: Callable[..., AppLab]
) -> None:
    main = training(fed_avg(fraction_train=0.6), rounds=3)
    expected = make_lab(5, main).run().sha256
    lab = make_lab(5, main)
    run_with_restarts(lab, at)
    assert lab.runner.head.sha256 == expected
    assert [row.state for row in lab.rows(schema.rounds)] == ["done"] * 6
    receipts = [receipt.verdict for device in lab.devices.values() for receipt in device.receipts]
    assert set(receipts) <= {"stored", "duplicate"}


def test_finished_app_is_not_started_again(make_lab: Callable[..., AppLab]) -> None:
    lab = make_lab(3, training(fed_avg(), rounds=1))
    head = lab.run()
    lab.restart()
    lab.runner.tick()
    assert lab.runner.is_finished
    assert len(lab.results) == 1
    assert lab.runner.head.sha256 == head.sha256


def test_app_that_fails_leaves_its_run_open_and_may_be_started_again(make_lab: Callable[..., AppLab]) -> None:
    attempts: list[int] = []

    def main(grid: Grid, context: Context) -> Any:
        result = training(fed_avg(), rounds=1)(grid, context)
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("no space left for the user's own file")
        return result

    lab = make_lab(3, main)
    lab.run()
    assert lab.results == []
    assert lab.rows(schema.runs)[0].status == "active"
    sent = len(lab.orders)
    lab.restart()
    lab.run()
    assert len(lab.results) == 1
    assert len(lab.orders) == sent
    assert lab.rows(schema.runs)[0].status == "finished"


# ---- killed at any step ------------------------------------------------------------------------------------


def in_turns(seen: list[list[str]]) -> Main:
    """A loop of its own, whose result depends on which replies came in which order; writes down what each life saw."""

    def main(grid: Grid, context: Context) -> Any:
        mine: list[str] = []
        seen.append(mine)
        params = start_params()
        for number in range(3):
            content = RecordDict({"model": initial_arrays(params), "config": ConfigRecord({"turn": number})})
            nodes = random.sample(list(grid.get_node_ids()), 3)
            waiting = set(grid.push_messages(Message(content, node, "train") for node in nodes))
            while waiting:
                for reply in grid.pull_messages(waiting):
                    waiting.discard(reply.metadata.reply_to_message_id)
                    mine.append(reply.metadata.reply_to_message_id)
                    # Not the same in another order.
                    params = (
                        np.float32(0.75) * params + np.float32(0.25) * flat(reply.content["arrays"])
                    ).astype("f4")
                time.sleep(0.001)
        return mine, params

    return main


def crash_at_every_step(lab: AppLab) -> int:
    """Kills whenever the record has one step more than ever before; returns how often."""
    crashes = longest = 0
    while not lab.runner.is_finished:
        lab.step()
        length = len(lab.steps())
        if length > longest and not lab.runner.is_finished:
            crashes, longest = crashes + 1, length
            lab.crash()
    return crashes


def test_flowers_loop_that_is_killed_at_every_step_gives_the_same_model(
    make_lab: Callable[..., AppLab],
) -> None:
    main = training(fed_avg(fraction_train=0.6), rounds=2)
    expected = make_lab(5, main).run().sha256
    lab = make_lab(5, main)
    assert crash_at_every_step(lab) >= 4
    assert lab.runner.head.sha256 == expected
    assert lab.rows(schema.grid_steps) == []


def test_own_loop_that_is_killed_at_every_step_sees_the_same_replies_in_the_same_order(
    make_lab: Callable[..., AppLab],
) -> None:
    seen: list[list[str]] = []
    lab = make_lab(4, in_turns(seen))
    assert crash_at_every_step(lab) >= 6
    mine, params = lab.results[-1]
    assert len(mine) == len(set(mine)) == 9
    for life in seen:
        assert mine[: len(life)] == life
    # The model that an app makes of these replies in this order, of the bytes that devices sent.
    replay = start_params()
    orders = {order.order_id: (name, order) for name, order in lab.orders}
    by_node = {lab.node_id(name): name for name in lab.devices}
    rows = {row.number: row for row in lab.rows(schema.rounds)}
    for message_id in mine:
        number, index = (int(part) for part in message_id.split("-"))
        name = by_node[rows[number].node_ids[index]]
        order = next(o for n, o in orders.values() if n == name and o.round_number == number)
        local = replay_base(lab, order.head_sha256) + decoded(lab, name, order)
        replay = (np.float32(0.75) * replay + np.float32(0.25) * local).astype("f4")
    np.testing.assert_array_equal(replay, params)


def replay_base(lab: AppLab, sha256: bytes) -> np.ndarray[Any, Any]:
    return lab.head(sha256).params


def decoded(lab: AppLab, name: str, order: Any) -> np.ndarray[Any, Any]:
    update = lab.devices[name].update(order)
    return decode(update.payload, update.codec, update.params_size)


def test_no_device_is_asked_again_for_an_exchange_that_is_done(make_lab: Callable[..., AppLab]) -> None:
    lab = make_lab(3, training(fed_avg(), rounds=2))
    while len([row for row in lab.rows(schema.rounds) if row.state == "done"]) < 3:
        lab.step()
    asked = [(name, order.order_id) for name, order in lab.orders if order.round_number <= 3]
    lab.crash()
    lab.run()
    assert [(name, order.order_id) for name, order in lab.orders if order.round_number <= 3] == asked


def test_device_that_comes_between_a_question_and_the_messages_changes_nothing_after_a_restart(
    make_lab: Callable[..., AppLab],
) -> None:
    told: list[list[int]] = []
    asked, joined = threading.Event(), threading.Event()

    def main(grid: Grid, context: Context) -> Any:
        told.append(sorted(grid.get_node_ids()))
        asked.set()
        assert joined.wait(PATIENCE_SECONDS)
        content = RecordDict({"a": initial_arrays(start_params())})
        grid.send_and_receive([Message(content, node, "train") for node in told[-1]])
        return told[-1]

    lab = make_lab(3, main)
    lab.absent = {"d02"}
    lab.runner.tick()
    assert asked.wait(PATIENCE_SECONDS)
    lab.come_back("d02")
    joined.set()
    while not lab.rows(schema.updates):
        lab.step()
    lab.crash()
    lab.run()
    assert len(told) == 2
    assert told[0] == told[1]


def test_app_that_seeds_nothing_draws_the_same_after_a_restart(make_lab: Callable[..., AppLab]) -> None:
    drawn: list[float] = []

    def main(grid: Grid, context: Context) -> Any:
        drawn.append(float(np.random.normal()))
        arrays = initial_arrays(start_params() * np.float32(drawn[-1]))
        return fed_avg()().start(grid, arrays, num_rounds=1)

    lab = make_lab(3, main)
    while not lab.rows(schema.updates):
        lab.step()
    lab.crash()
    lab.run()
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]
    assert lab.rows(schema.runs)[0].status == "finished"


def test_app_of_a_cloud_that_comes_out_of_a_backup_draws_what_it_drew(
    make_lab: Callable[..., AppLab],
) -> None:
    lab = make_lab(5, training(fed_avg(fraction_train=0.6), rounds=2))
    while len([row for row in lab.rows(schema.rounds) if row.state == "done"]) < 2:
        lab.step()
    with lab.database.transaction() as connection:
        # As `reincarnate` does, so that no order is given twice.
        connection.execute(schema.runs.update().values(seed=99))
    lab.crash()
    lab.run()
    assert [row.state for row in lab.rows(schema.rounds)] == ["done"] * 4
    assert lab.rows(schema.runs)[0].status == "finished"


# ---- an app that does something else -----------------------------------------------------------------------


def content(scale: float = 1.0, **config: Any) -> RecordDict:
    arrays = initial_arrays(start_params() * np.float32(scale))
    return RecordDict({"a": arrays, "c": ConfigRecord(dict(config))})


def ask(grid: Grid, kind: str = "train", scale: float = 1.0, most: int = 9, **config: Any) -> Any:
    nodes = sorted(grid.get_node_ids())[:most]
    return grid.send_and_receive([Message(content(scale, **config), node, kind) for node in nodes])


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (lambda grid: ask(grid, scale=2.0), "at step 6 .* with other arrays"),
        (lambda grid: ask(grid, lr=0.5), "at step 6 .* with another configuration"),
        (lambda grid: ask(grid, most=2), "at step 6 .* to another number of nodes"),
        (lambda grid: ask(grid, kind="evaluate"), "at step 6 .* of another type"),
        (lambda grid: grid.push_messages([]), "at step 5 .* it asked who is there, and now it returned"),
        (
            lambda grid: list(grid.get_node_ids()),
            "at step 6 .* it sent messages .exchange 2, train., and now it returned",
        ),
        (
            lambda grid: grid.push_messages([Message(content(), 1, "train")]),
            "at step 5 .* now it sent messages",
        ),
    ],
)
def test_app_that_does_something_else_after_a_restart_is_told_where(
    then: Callable[[Grid], Any],
    said: str,
    make_lab: Callable[..., AppLab],
    caplog: pytest.LogCaptureFixture,
) -> None:
    lives: list[int] = []

    def main(grid: Grid, context: Context) -> Any:
        lives.append(1)
        ask(grid)
        if len(lives) == 1:
            ask(grid)
            ask(grid)
            return None
        try:
            then(grid)
        except RoundError:
            # An app that hides its errors is told nothing more either.
            for call in (grid.get_node_ids, lambda: ask(grid), lambda: grid.pull_messages(["1-0"])):
                with pytest.raises(RoundError):
                    call()
        return None

    lab = make_lab(3, main)
    while len(lab.steps()) < 7:
        lab.step()
    lab.crash()
    sent = len(lab.orders)
    lab.run()
    assert lab.rows(schema.runs)[0].status == "active"
    assert len([order for _, order in lab.orders[sent:] if order.round_number > 2]) == 0
    (failure,) = [record for record in caplog.records if record.getMessage() == "serverapp_failed"]
    fields = failure.__dict__["fields"]
    assert re.search(said, fields["reason"])
    assert fields["step"] in (5, 6)
    assert "shoal-cloud round anew" in fields["hint"]


def test_app_that_is_begun_anew_goes_from_its_start_and_nothing_of_before_counts(
    make_lab: Callable[..., AppLab],
) -> None:
    scales = iter([1.0, 2.0, 2.0])

    def main(grid: Grid, context: Context) -> Any:
        scale = next(scales)
        return [flat(reply.content["arrays"]) for _ in range(2) for reply in ask(grid, scale=scale)]

    lab = make_lab(3, main)
    while len(lab.rows(schema.updates)) < 4:
        lab.step()
    lab.stops[-1]()
    with lab.database.transaction() as connection:
        begin_anew(connection, RUN, START)
    lab.crash()
    while len(lab.rows(schema.updates)) < 8:
        lab.step()
    # A restart goes on from there, and not from what was before.
    lab.crash()
    lab.run()
    assert [row.state for row in lab.rows(schema.rounds)] == ["done", "failed", "done", "done"]
    ends = {(row.round, row.state) for row in lab.rows(schema.updates)}
    # What devices send for a round that the command ended is late.
    assert ends == {(1, "discarded"), (2, "discarded"), (2, "late"), (3, "folded"), (4, "folded")}
    assert len(lab.results[-1]) == 6
    assert lab.rows(schema.runs)[0].status == "finished"


BEGUN = GridStep(position=1, kind=BEGIN, answer={"after": 0, "seed": 1})


# ---- the tape ----------------------------------------------------------------------------------------------


def test_app_that_waits_in_vain_for_what_the_record_has_not_is_told_so() -> None:
    now = [0.0]
    tape = Tape(lambda step: None, patience_seconds=60.0, monotonic=lambda: now[0])
    asked = {"exchange": 1, "type": "train"}
    tape.load([BEGUN, GridStep(position=2, kind=PUSH, asked=asked)])
    tape.begin(1)
    # An app that gave up by its clock asks like this, too.
    assert tape.told_pull(["1-0"]) == []
    now[0] = 59.0
    assert tape.told_pull(["1-0"]) == []
    now[0] = 61.0
    with pytest.raises(
        RoundError, match=r"at step 2 of 2 it sent messages .exchange 1, train., and now it waits"
    ):
        tape.told_pull(["1-0"])


def test_polls_that_bring_nothing_new_are_not_kept() -> None:
    kept: list[GridStep] = []
    tape = Tape(kept.append, patience_seconds=60.0, monotonic=time.monotonic)
    for nodes in ([1], [1], [1, 2], [1, 2]):
        tape.keep_nodes(nodes)
    tape.keep_pull([])
    tape.push(1, [Message(content(), 1, "train")])
    tape.keep_nodes([1, 2])
    tape.keep_pull([("1-0", "error")])
    assert [(step.position, step.kind) for step in kept] == [
        (1, NODES),
        (2, NODES),
        (3, PUSH),
        (4, NODES),
        (5, PULL),
    ]
    # A fleet of many is written down once.
    assert [step.answer.get("nodes") for step in kept if step.kind == NODES] == [[1], [1, 2], None]
    again = Tape(kept.append, patience_seconds=60.0, monotonic=time.monotonic)
    again.load([BEGUN, *kept])
    again.begin(1)
    assert [again.told_nodes(), again.told_nodes()] == [(1,), (1, 2)]
    again.push(1, [Message(content(), 1, "train")])
    assert again.told_nodes() == (1, 2)
    assert again.told_pull(["1-0"]) == [("1-0", "error")]
    assert again.is_played


def test_refusal_is_told_again() -> None:
    kept: list[GridStep] = []
    tape = Tape(kept.append, patience_seconds=60.0, monotonic=time.monotonic)
    tape.keep_refusal("no such type")
    again = Tape(kept.append, patience_seconds=60.0, monotonic=time.monotonic)
    again.load([BEGUN, *kept])
    again.begin(1)
    with pytest.raises(RoundError, match="no such type"):
        again.told_pull(["1-0"], is_waiting=True)


def test_record_that_was_begun_anew_starts_after_what_was_and_draws_from_its_own_seed() -> None:
    tape = Tape(lambda step: None, patience_seconds=60.0, monotonic=time.monotonic)
    tape.load([GridStep(position=1, kind=BEGIN, answer={"after": 7, "seed": 5})])
    assert tape.begin(9) == 5
    assert (tape.is_played, tape.after, tape.position) == (True, 7, 2)
