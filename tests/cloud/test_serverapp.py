"""A stock ServerApp over our grid: Flower's own loop, our devices, and every way to go wrong."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedMedian

from cloud_server.db import schema
from cloud_server.flower.exchange import Board
from cloud_server.flower.grid import ShoalGrid
from cloud_server.flower.serverapp import load_server_app
from tests.cloud.app_lab import (
    MANIFEST,
    PATIENCE_SECONDS,
    AppLab,
    app_labs,
    empty_tape,
    fed_avg,
    flat,
    initial_arrays,
    start_params,
    training,
)
from wire.codec import decode
from wire.errors import ConfigurationError, QuorumError, RoundError
from wire.messages import Join


@pytest.fixture
def make_lab() -> Iterator[Callable[..., AppLab]]:
    with app_labs() as make:
        yield make


# ---- good runs ---------------------------------------------------------------------------------------------


def test_stock_app_trains_evaluates_and_releases(make_lab: Callable[..., AppLab]) -> None:
    lab = make_lab(3, training(fed_avg()))
    head = lab.run()
    (result,) = lab.results
    np.testing.assert_array_equal(flat(result.arrays), head.params)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == pytest.approx(
        lab.candidates[4].metrics["accuracy"]
    )
    assert sorted(lab.candidates) == [2, 4]
    assert lab.candidates[4].checkpoint.sha256 == head.sha256
    rounds = lab.rows(schema.rounds)
    assert [(row.number, row.state) for row in rounds] == [(1, "done"), (2, "done"), (3, "done"), (4, "done")]
    assert lab.rows(schema.runs)[0].status == "finished"
    assert {row.state for row in lab.rows(schema.updates)} == {"folded"}
    assert all(row.body is None for row in lab.rows(schema.updates))


def test_first_round_is_flowers_weighted_mean(make_lab: Callable[..., AppLab]) -> None:
    lab = make_lab(3, training(fed_avg(), rounds=1))
    lab.run()
    orders = {name: order for name, order in lab.orders if order.kind == "train"}
    updates = [lab.devices[name].update(order) for name, order in orders.items()]
    vectors = np.stack([decode(u.payload, u.codec, u.params_size) for u in updates]).astype(np.float64)
    weights = np.array([u.num_examples for u in updates], np.float64)
    expected = start_params() + (weights[:, None] * vectors).sum(0) / weights.sum()
    np.testing.assert_allclose(flat(lab.results[0].arrays), expected, rtol=0, atol=5e-7)


def test_app_configures_the_devices(make_lab: Callable[..., AppLab]) -> None:
    lab = make_lab(3, training(fed_avg(), rounds=1))
    lab.run()
    train = lab.invitations[0].train
    assert (train.learning_rate, train.epochs) == (0.25, 3)


def test_app_without_evaluation_still_gives_candidates(make_lab: Callable[..., AppLab]) -> None:
    lab = make_lab(3, training(fed_avg(fraction_evaluate=0.0), rounds=3))
    lab.run()
    assert sorted(lab.candidates) == [2, 3]
    assert all(candidate.devices == 0 for candidate in lab.candidates.values())


def test_app_sees_its_configuration_and_its_grid(make_lab: Callable[..., AppLab]) -> None:
    def main(grid: Grid, context: Context) -> Any:
        return dict(context.run_config), sorted(grid.get_node_ids()), grid.run.run_id

    lab = make_lab(2, main)
    lab.run()
    config, node_ids, run_id = lab.results[0]
    assert config == {"num-rounds": 2}
    assert node_ids == sorted(lab.present().values())
    assert run_id == 1


def test_app_may_push_and_pull(make_lab: Callable[..., AppLab]) -> None:
    def main(grid: Grid, context: Context) -> Any:
        content = RecordDict({"model": initial_arrays(start_params()), "config": ConfigRecord()})
        messages = [grid.create_message(content, "evaluate", node_id, "1") for node_id in grid.get_node_ids()]
        waiting = set(grid.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            for reply in grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies

    lab = make_lab(3, main)
    lab.run()
    assert len(lab.results[0]) == 3
    assert all("accuracy" in reply.content["metrics"] for reply in lab.results[0])


def test_replies_can_be_read_again_and_by_position(make_lab: Callable[..., AppLab]) -> None:
    def main(grid: Grid, context: Context) -> Any:
        content = RecordDict({"arrays": initial_arrays(start_params())})
        messages = [Message(content, node_id, "train") for node_id in grid.get_node_ids()]
        replies: Any = grid.send_and_receive(messages, timeout=60)
        twice = [[flat(reply.content["arrays"]) for reply in replies] for _ in range(2)]
        return len(replies), twice, flat(replies[0].content["arrays"]), len(replies[1:])

    lab = make_lab(3, main)
    lab.run()
    count, (first, second), zeroth, rest = lab.results[0]
    assert (count, rest) == (3, 2)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[0], zeroth)


def test_arrays_by_position_and_counters_of_batches_go_back_as_they_came(
    make_lab: Callable[..., AppLab],
) -> None:
    def by_name(grid: Grid, context: Context) -> Any:
        record = initial_arrays(start_params())
        record["norm.num_batches_tracked"] = Array(np.asarray(7))
        return exchange(grid, record)

    def by_position(grid: Grid, context: Context) -> Any:
        return exchange(
            grid, ArrayRecord([array.numpy() for array in initial_arrays(start_params()).values()])
        )

    def exchange(grid: Grid, record: ArrayRecord) -> Any:
        messages = [Message(RecordDict({"m": record}), node_id, "train") for node_id in grid.get_node_ids()]
        return [reply.content["arrays"] for reply in grid.send_and_receive(messages)]

    lab = make_lab(2, by_name)
    lab.run()
    assert list(lab.results[0][0]) == [*(slot.name for slot in MANIFEST.params), "norm.num_batches_tracked"]
    assert lab.results[0][0]["norm.num_batches_tracked"].numpy() == 7
    lab = make_lab(2, by_position)
    lab.run()
    assert list(lab.results[0][0]) == ["0", "1", "2", "3"]
    assert lab.results[0][0]["0"].numpy().shape == (6, 4)


# ---- devices that do not answer ----------------------------------------------------------------------------


def test_silent_and_declining_devices_are_error_replies_and_the_app_goes_on(
    make_lab: Callable[..., AppLab],
) -> None:
    lab = make_lab(5, training(fed_avg(), rounds=2))
    lab.devices["d01"].behaviour = lambda device, order: None
    lab.devices["d02"].behaviour = lambda device, order: Join(order_id=order.order_id, accepted=False)
    lab.run()
    assert len(lab.results) == 1
    assert lab.rows(schema.runs)[0].status == "finished"


def test_killer_reply_does_not_reach_the_app(make_lab: Callable[..., AppLab]) -> None:
    lab = make_lab(4, training(lambda: FedMedian(min_available_nodes=3), rounds=1))
    lab.devices["d01"].behaviour = lambda device, order: device.message(
        device.update(order, payload=b"\xff" * 40), order
    )
    lab.run()
    assert np.isfinite(flat(lab.results[0].arrays)).all()


def test_node_that_is_gone_is_an_error_reply(make_lab: Callable[..., AppLab]) -> None:
    def main(grid: Grid, context: Context) -> Any:
        content = RecordDict({"arrays": initial_arrays(start_params())})
        messages = [Message(content, node_id, "evaluate") for node_id in [12345, *grid.get_node_ids()]]
        return [reply.has_error() for reply in grid.send_and_receive(messages)]

    lab = make_lab(2, main)
    lab.run()
    assert lab.results[0] == [True, False, False]


def test_app_that_waits_for_more_nodes_than_there_are_is_stopped() -> None:
    board, now = Board(), [0.0]
    board.set_node_ids([1, 2])
    grid = ShoalGrid(board, empty_tape(), seed=1, quorum_seconds=600.0, monotonic=lambda: now[0])
    assert list(grid.get_node_ids()) == [1, 2]
    now[0] = 599.0
    assert list(grid.get_node_ids()) == [1, 2]
    now[0] = 601.0
    with pytest.raises(QuorumError) as caught:
        grid.get_node_ids()
    assert "min_available_nodes" in caught.value.hint


def test_quorum_that_does_not_come_is_an_error() -> None:
    board = Board()
    board.set_node_ids([1])
    with pytest.raises(QuorumError):
        board.node_ids(2, 0.0)


# ---- the end ------------------------------------------------------------------------------------------------


def test_stop_wakes_an_app_that_waits() -> None:
    board = Board()
    grid = ShoalGrid(board, empty_tape(), seed=1)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            grid.send_and_receive([Message(RecordDict(), 1, "train")])
        except RoundError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    board.close()
    thread.join(PATIENCE_SECONDS)
    assert [str(error) for error in raised] == ["the aggregator stops"]


# ---- apps that our devices cannot serve --------------------------------------------------------------------


def content_with(**records: Any) -> RecordDict:
    return RecordDict(records)


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (lambda: content_with(config=ConfigRecord()), "train", "0 array records"),
        (lambda: content_with(a=initial_arrays(start_params())), "query", "query"),
        (lambda: content_with(**{"fitins.parameters": ArrayRecord()}), "train", "legacy"),
        (lambda: content_with(a=ArrayRecord([np.zeros(3, np.float32)])), "train", "not those of the model"),
        (lambda: content_with(a=ArrayRecord([np.zeros(3, np.float32)] * 4)), "train", "shape"),
        (
            lambda: content_with(a=initial_arrays(start_params()), c=ConfigRecord({"lr": -1.0})),
            "train",
            "configuration",
        ),
        (
            lambda: content_with(a=initial_arrays(start_params()), c=ConfigRecord({"lr": "fast"})),
            "train",
            "configuration",
        ),
    ],
)
def test_message_that_devices_cannot_answer_raises_in_the_app(
    content: Callable[[], RecordDict], kind: str, said: str, make_lab: Callable[..., AppLab]
) -> None:
    def main(grid: Grid, context: Context) -> Any:
        messages = [Message(content(), node_id, kind) for node_id in grid.get_node_ids()]
        with pytest.raises(RoundError, match=said):
            grid.send_and_receive(messages[:1])
        return "told"

    lab = make_lab(2, main)
    lab.run()
    assert lab.results == ["told"]


def test_messages_with_different_content_raise_in_the_app(make_lab: Callable[..., AppLab]) -> None:
    def main(grid: Grid, context: Context) -> Any:
        messages = [
            Message(content_with(a=initial_arrays(start_params() + np.float32(i))), node_id, "train")
            for i, node_id in enumerate(grid.get_node_ids())
        ]
        with pytest.raises(RoundError, match="same content"):
            grid.send_and_receive(messages)
        return "told"

    lab = make_lab(2, main)
    lab.run()
    assert lab.results == ["told"]


# ---- loading -----------------------------------------------------------------------------------------------

APP = """
from flwr.serverapp import ServerApp
app = ServerApp()
number = 3
"""


@pytest.fixture
def user_folder(tmp_path: Path) -> Iterator[Path]:
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_load_of_a_users_app(user_folder: Path) -> None:
    (user_folder / "their_server_app.py").write_text(APP)
    app = load_server_app("their_server_app:app", user_folder)
    assert isinstance(app, ServerApp)
    assert sys.path[-1] == str(user_folder)


def test_users_package_called_models_does_not_hide_ours(user_folder: Path) -> None:
    package = user_folder / "models"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    (user_folder / "their_other_app.py").write_text(APP)
    load_server_app("their_other_app:app", user_folder)
    saved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "models"}
    try:
        import models.task

        assert str(user_folder) not in str(models.task.__file__)
    finally:
        sys.modules.update(saved)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("their_app", "names no app"),
        (":app", "names no app"),
        ("absent_module:app", "absent_module"),
        ("their_app:absent", "not a Flower ServerApp"),
        ("their_app:number", "not a Flower ServerApp"),
        ("broken_app:app", "cannot be imported"),
        ("needy_app:app", "absent_dependency"),
        ("raising_app:app", "KeyError: 'a'"),
    ],
)
def test_load_of_what_is_no_app_is_an_error_with_a_hint(spec: str, said: str, user_folder: Path) -> None:
    (user_folder / "their_app.py").write_text(APP)
    (user_folder / "broken_app.py").write_text("def (")
    (user_folder / "needy_app.py").write_text("import absent_dependency")
    (user_folder / "raising_app.py").write_text("raise KeyError('a')")
    with pytest.raises(ConfigurationError, match=said):
        load_server_app(spec, user_folder)


def test_metric_record_of_a_reply_has_the_weight(make_lab: Callable[..., AppLab]) -> None:
    def main(grid: Grid, context: Context) -> Any:
        content = content_with(a=initial_arrays(start_params()))
        messages = [Message(content, node_id, "train") for node_id in grid.get_node_ids()]
        return [reply.content["metrics"] for reply in grid.send_and_receive(messages)]

    lab = make_lab(2, main)
    lab.run()
    assert all(isinstance(record, MetricRecord) for record in lab.results[0])
    assert {record["num-examples"] for record in lab.results[0]} == {
        row.num_examples for row in lab.rows(schema.updates)
    }
