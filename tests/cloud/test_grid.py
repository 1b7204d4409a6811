"""The contract with Flower's private parts: a new version of flwr fails here first."""

from __future__ import annotations

import inspect
import logging
import os

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from cloud_server.flower import private
from cloud_server.flower.exchange import Board
from cloud_server.flower.grid import LazyReplies, ShoalGrid
from cloud_server.flower.planning import PlanningGrid
from cloud_server.flower.records import as_named, to_record
from tests.cloud.app_lab import empty_tape
from tests.cloud.round_lab import SHAPES, make_slots
from wire.errors import RoundError

SLOTS = make_slots(SHAPES)
VECTOR = np.arange(sum(slot.size for slot in SLOTS), dtype=np.float32)


def test_telemetry_is_off_and_flower_says_only_warnings() -> None:
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert logging.getLogger("flwr").level == logging.WARNING


def test_identity_makes_messages_possible() -> None:
    private.set_identity()
    message = Message(RecordDict(), dst_node_id=5, message_type="train")
    assert message.metadata.run_id == private.RUN_ID
    assert message.metadata.src_node_id == private.SERVER_NODE_ID


def test_message_id_can_be_set_and_a_reply_refers_to_it() -> None:
    private.set_identity()
    message = Message(RecordDict(), dst_node_id=5, message_type="train")
    private.set_message_id(message, "3-1")
    reply = Message(RecordDict(), reply_to=message)
    assert message.metadata.message_id == "3-1"
    assert reply.metadata.reply_to_message_id == "3-1"
    assert reply.metadata.src_node_id == 5


def test_array_view_is_an_array_without_a_copy() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    view, array = private.ArrayView(values), Array(values)
    assert isinstance(view, Array)
    assert (view.dtype, view.shape, view.stype, view.data) == (
        array.dtype,
        array.shape,
        array.stype,
        array.data,
    )
    assert np.shares_memory(view.numpy(), values)
    assert ArrayRecord({"a": view})["a"].data == array.data


def test_array_view_of_part_of_a_vector_serializes_that_part() -> None:
    view = to_record(VECTOR, SLOTS)["first.bias"]
    np.testing.assert_array_equal(Array(view.dtype, view.shape, view.stype, view.data).numpy(), VECTOR[24:30])


def test_record_of_views_goes_into_a_message_and_comes_out() -> None:
    private.set_identity()
    content = RecordDict({"arrays": to_record(VECTOR, SLOTS), "config": ConfigRecord({"a": 1})})
    message = Message(content, dst_node_id=5, message_type="train")
    assert np.shares_memory(message.content["arrays"]["last.weight"].numpy(), VECTOR)
    assert set(as_named(message.content["arrays"])) == set(SHAPES)


def test_collections_are_cheap_only_inside() -> None:
    import gc

    frozen = gc.get_freeze_count()
    with private.cheap_collections():
        assert gc.get_freeze_count() > frozen
    assert gc.get_freeze_count() == 0


def test_empty_run_is_what_grid_run_answers() -> None:
    assert ShoalGrid(Board(), empty_tape(), seed=1).run.run_id == private.RUN_ID
    assert PlanningGrid([1]).run.run_id == private.RUN_ID


def test_grids_have_every_method_that_flower_asks_for() -> None:
    wanted = {
        name: set(inspect.signature(member).parameters)
        for name, member in vars(Grid).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }
    assert {"get_node_ids", "send_and_receive", "push_messages", "pull_messages"} <= set(wanted)
    for ours in (ShoalGrid, PlanningGrid):
        for name, parameters in wanted.items():
            assert set(inspect.signature(getattr(ours, name)).parameters) == parameters


def test_planning_grid_sends_nothing() -> None:
    grid = PlanningGrid([1, 2])
    for send in (grid.push_messages, grid.pull_messages, grid.send_and_receive):
        with pytest.raises(RoundError):
            send([])


def test_strategies_have_the_attributes_that_their_state_lives_in() -> None:
    adam = flower.FedAdam()
    assert (adam.m_t, adam.v_t, adam.current_arrays) == (None, None, None)
    assert (flower.FedAvgM().momentum_vector, flower.FedAvgM().current_arrays) == (None, None)
    assert flower.QFedAvg(client_learning_rate=0.1).current_arrays is None
    adaptive = flower.DifferentialPrivacyServerSideAdaptiveClipping(flower.FedAvg(), 0.0, 2)
    assert adaptive.clipping_norm == 0.1
    assert type(adaptive.strategy) is flower.FedAvg


def test_sending_nothing_waits_for_nothing() -> None:
    grid = ShoalGrid(Board(), empty_tape(), seed=1)
    assert list(grid.send_and_receive([])) == []
    assert list(grid.push_messages([])) == []
    assert list(grid.pull_messages([])) == []


def test_lazy_replies_are_made_when_they_are_read() -> None:
    private.set_identity()
    made: list[int] = []

    def maker(number: int) -> Message:
        made.append(number)
        return Message(RecordDict(), dst_node_id=number, message_type="train")

    replies = LazyReplies([lambda number=number: maker(number) for number in (1, 2)])  # type: ignore[misc]
    assert (len(replies), made) == (2, [])
    assert [reply.metadata.dst_node_id for reply in replies] == [1, 2]
    assert replies[1].metadata.dst_node_id == 2
    assert made == [1, 2, 2]


def test_sampling_from_the_grid_follows_from_its_seed() -> None:
    from random import sample

    board = Board()
    board.set_node_ids(range(100))
    drawn = [sample(list(ShoalGrid(board, empty_tape(), seed=seed).get_node_ids()), 10) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
