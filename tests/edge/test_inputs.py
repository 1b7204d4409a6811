"""The doors: every item gets one answer, bad ones an error, and no door ever stops for what came through it."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.inference.serving import Answer
from edge_agent.inputs.files import MAX_BAD_ROWS, ORPHAN_POLLS, FileInput, read_items
from edge_agent.inputs.item import Item, as_window, read_item, read_payload
from edge_agent.inputs.lines import LineInput
from edge_agent.inputs.topic import TopicInput, parse_topic_url
from edge_agent.ports import Floats
from tests.edge.lab import VirtualTime
from wire.errors import ConfigurationError, DataError, StorageError
from wire.transport import Packet
from wire.transport.memory import MemoryBroker, MemoryTransport

SHAPE = (2, 3)


class Ledger:
    """An agent as a door sees it; answers the sum of a window and writes down what it was taught."""

    def __init__(self) -> None:
        self.observed: list[tuple[list[float], int | None, str | None]] = []
        self.known: dict[str, int] = {}

    def infer(self, x: Floats, *, sample_id: str = "") -> Answer:
        if x.shape != SHAPE:
            raise DataError(f"a window has the shape {list(x.shape)}, the model takes {list(SHAPE)}")
        scores = np.array([x.sum(), 0.0], np.float32)
        return Answer(0, "still", scores, 4, sample_id or "made-up")

    def observe(self, x: Floats, label: int | None = None, split: str | None = None) -> int:
        self.observed.append((x.ravel().tolist(), label, split))
        return len(self.observed)

    def feedback(self, sample_id: str, label: int) -> bool:
        if sample_id == "gone":
            return False
        self.known[sample_id] = label
        return True


class Mark:
    """A bookmark in memory."""

    def __init__(self) -> None:
        self.text = ""

    def read(self) -> str:
        return self.text

    def write(self, mark: str) -> None:
        self.text = mark


def never() -> bool:
    return False


def run_lines(text: bytes) -> tuple[Ledger, list[dict[str, Any]]]:
    agent, answers = Ledger(), list[dict[str, Any]]()
    LineInput(io.BytesIO(text), answers.append).run(agent, never)
    return agent, answers


WINDOW = [[1.0, 2.0, 3.0], [0.0, 0.0, 0.5]]


def line(**values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"


def test_window_is_answered_with_label_scores_and_release() -> None:
    _, answers = run_lines(line(window=WINDOW, id="w1"))
    assert answers == [
        {"id": "w1", "label": 0, "name": "still", "score": 6.5, "scores": [6.5, 0.0], "release": 4}
    ]


def test_labelled_window_is_answered_and_learned_from() -> None:
    agent, answers = run_lines(line(window=WINDOW, label=3))
    assert len(answers) == 1
    assert agent.observed == [([1.0, 2.0, 3.0, 0.0, 0.0, 0.5], 3, None)]


class FullDisk(Ledger):
    def observe(self, x: Floats, label: int | None = None, split: str | None = None) -> int:
        raise StorageError("database: disk is full", full=True)


def test_full_disk_costs_the_sample_but_not_the_answer() -> None:
    answers: list[dict[str, Any]] = []
    LineInput(io.BytesIO(line(window=WINDOW, label=3, id="w")), answers.append).run(FullDisk(), never)
    assert (answers[0]["label"], answers[0]["kept"]) == (0, False)


def test_labelled_window_may_name_its_split() -> None:
    agent, answers = run_lines(line(window=WINDOW, label=1, split="val") + line(window=WINDOW, split="val"))
    assert [split for _, _, split in agent.observed] == ["val"]
    assert "split" in answers[1]["error"]


def test_label_alone_corrects_an_answer() -> None:
    agent, answers = run_lines(line(id="w1", label=2) + line(id="gone", label=1))
    assert agent.known == {"w1": 2}
    assert answers[0] == {"id": "w1", "accepted": True}
    assert answers[1]["id"] == "gone"
    assert "no answered window 'gone'" in answers[1]["error"]
    assert answers[1]["hint"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"nonsense\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b"[1, 2]\n", "not an object"),
        (b"{}\n", "neither a window"),
        (line(windw=WINDOW), "not an object with"),
        (line(window=[[1, 2], [3]]), "different lengths"),
        (line(window=[["a"]]), "not a number"),
        (b'{"window": [[1e39, 2, 3], [0, 0, 0]], "id": "half \\ud800"}\n', "an id is a text"),
        (line(window=[]), "not a number"),
        (line(window=[[1, 2, 3]]), "the model takes"),
        (line(window=WINDOW, label="x"), "class number"),
        (line(window=WINDOW, label=True), "class number"),
        (line(window=WINDOW, id="x" * 300), "an id is"),
        (line(window=WINDOW, id=[1]), "an id is"),
        (line(label=3), "neither a window"),
        (b"[" * 100_000 + b"\n", "not JSON"),
    ],
)
def test_bad_line_is_answered_with_an_error_and_the_next_one_is_read(text: bytes, message: str) -> None:
    _, answers = run_lines(text + line(window=WINDOW, id="after"))
    assert len(answers) == 2
    assert message in answers[0]["error"]
    assert answers[1]["id"] == "after"


def test_errors_name_the_item_or_its_line() -> None:
    _, answers = run_lines(b"\n" + line(window=[[1]], id="w9") + b"nonsense\n")
    assert [answer["id"] for answer in answers] == ["w9", "line 3"]


def test_line_that_is_too_long_is_skipped_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.inputs.lines.MAX_LINE_BYTES", 200)
    _, answers = run_lines(b"[" + b"1," * 1000 + b"1]\n" + line(window=WINDOW, id="after"))
    assert [answer.get("error", "") for answer in answers] == ["a line is too long", ""]


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_an_item_or_our_error(text: bytes) -> None:
    try:
        item = read_item(text)
    except DataError:
        return
    assert isinstance(item, Item)


def test_windows_become_float32() -> None:
    assert as_window([[1, 2], [3, 4]]).dtype == np.float32


# --- files ---


def take(path: Path) -> list[Item]:
    return list(read_items(path, SHAPE))


def test_npy_of_many_windows_with_labels_beside_it(tmp_path: Path) -> None:
    windows = np.arange(18.0).reshape(3, 2, 3)
    np.save(tmp_path / "a.npy", windows)
    np.save(tmp_path / "a.labels.npy", np.array([2, 0, 1]))
    items = take(tmp_path / "a.npy")
    assert [(item.id, item.label) for item in items] == [("a.npy#0", 2), ("a.npy#1", 0), ("a.npy#2", 1)]
    np.testing.assert_array_equal(items[2].window, windows[2])


def test_npy_of_one_window(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones(SHAPE))
    (item,) = take(tmp_path / "a.npy")
    assert item.window is not None
    assert item.window.shape == SHAPE


def test_csv_with_a_header_of_label_and_id(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,a,b,c,d,e,f,label\nx,1,2,3,4,5,6,2\ny,1,1,1,1,1,1,\n")
    items = take(tmp_path / "a.csv")
    assert [(item.id, item.label) for item in items] == [("x", 2), ("y", None)]
    np.testing.assert_array_equal(items[0].window, [[1, 2, 3], [4, 5, 6]])


def test_csv_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2,3,4,5,6\n\n6,5,4,3,2,1\n")
    assert [item.id for item in take(tmp_path / "a.csv")] == ["a.csv#0", "a.csv#2"]


def damaged_files() -> Iterator[tuple[str, bytes, str]]:
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    wrong = io.BytesIO()
    np.save(wrong, np.ones((4, 5)))
    text = io.BytesIO()
    np.save(text, np.array([["a"]]))
    yield "pickle.npy", pickled.getvalue(), "not a .npy file of numbers"
    yield "short.npy", wrong.getvalue()[:70], "not a .npy file of numbers"
    yield "empty.npy", b"", "not a .npy file of numbers"
    yield "wrong.npy", wrong.getvalue(), "the model takes"
    yield "text.npy", text.getvalue(), "not numbers"
    yield "few.csv", b"1,2,3\n", "3 values, a window has 6"
    yield "words.csv", b"1,2,3,4,5,6\n1,2,three,4,5,6\n", "row 2"
    yield "label.csv", b"a,b,c,d,e,f,label\n1,2,3,4,5,6,sitting\n", "whole numbers as labels"


@pytest.mark.parametrize(
    ("name", "data", "message"), list(damaged_files()), ids=lambda value: str(value)[:20]
)
def test_bad_file_is_a_data_error_that_says_where(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    answers: list[dict[str, Any]] = []
    FileInput(tmp_path / name, answers.append, input_shape=lambda: SHAPE, bookmark=Mark()).run(
        Ledger(), never
    )
    assert message in f"{answers[-1]['error']} {answers[-1].get('hint')}"
    assert name in answers[-1]["error"]


def test_bad_row_of_a_csv_file_is_passed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2,3,4,5,6\n1,2\n1,2,3,4,5,six\n6,5,4,3,2,1\n")
    answers: list[dict[str, Any]] = []
    FileInput(tmp_path / "a.csv", answers.append, input_shape=lambda: SHAPE, bookmark=Mark()).run(
        Ledger(), never
    )
    assert [answer["id"] for answer in answers] == ["a.csv#0", "a.csv", "a.csv", "a.csv#3"]
    assert ["row 2" in answers[1]["error"], "row 3" in answers[2]["error"]] == [True, True]


def test_csv_file_with_nothing_but_bad_rows_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2\n" * 1000)
    answers: list[dict[str, Any]] = []
    FileInput(tmp_path / "a.csv", answers.append, input_shape=lambda: SHAPE, bookmark=Mark()).run(
        Ledger(), never
    )
    assert len(answers) == MAX_BAD_ROWS + 1
    assert "the rest is left out" in answers[-1]["error"]


def test_labels_that_are_not_as_many_as_windows_are_a_data_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, *SHAPE)))
    np.save(tmp_path / "a.labels.npy", np.array([1, 2]))
    with pytest.raises(DataError, match="for 3 windows"):
        take(tmp_path / "a.npy")


class FolderRun:
    """A folder input that is polled a given number of times; `between` runs before each poll but the first."""

    def __init__(self, folder: Path, mark: Mark) -> None:
        self.agent = Ledger()
        self.answers: list[dict[str, Any]] = []
        self._mark = mark
        self._folder = folder

    def poll(self, *between: Any, polls: int = 2) -> list[str]:
        actions = iter([*between, *[lambda: None] * (polls - len(between))])
        stopped = False

        def pause(_: float) -> None:
            nonlocal stopped
            action = next(actions, None)
            stopped = action is None
            if action is not None:
                action()

        door = FileInput(
            self._folder, self.answers.append, input_shape=lambda: SHAPE, bookmark=self._mark, pause=pause
        )
        before = len(self.answers)
        door.run(self.agent, lambda: stopped)
        return [answer["id"] for answer in self.answers[before:]]


def put(folder: Path, name: str, time: int, count: int = 1) -> None:
    np.save(folder / name, np.ones((count, *SHAPE)))
    os.utime(folder / name, ns=(time, time))


def test_folder_takes_new_files_in_the_order_of_their_times(tmp_path: Path) -> None:
    put(tmp_path, "b.npy", 1_000)
    put(tmp_path, "a.npy", 2_000, count=2)
    (tmp_path / "notes.txt").write_text("not a window")
    run = FolderRun(tmp_path, Mark())
    assert run.poll(lambda: put(tmp_path, "c.npy", 3_000), polls=4) == [
        "b.npy#0",
        "a.npy#0",
        "a.npy#1",
        "c.npy#0",
    ]


def test_folder_goes_on_after_a_restart_where_it_stopped(tmp_path: Path) -> None:
    mark = Mark()
    put(tmp_path, "a.npy", 1_000)
    assert FolderRun(tmp_path, mark).poll() == ["a.npy#0"]
    put(tmp_path, "b.npy", 2_000)
    assert FolderRun(tmp_path, mark).poll() == ["b.npy#0"]
    assert FolderRun(tmp_path, mark).poll() == []


def test_folder_waits_for_a_file_that_grows_and_for_those_after_it(tmp_path: Path) -> None:
    put(tmp_path, "a.npy", 1_000)
    put(tmp_path, "b.npy", 2_000)
    grow = [lambda count=count: put(tmp_path, "a.npy", 1_000, count) for count in (2, 3)]
    assert FolderRun(tmp_path, Mark()).poll(*grow, polls=5) == ["a.npy#0", "a.npy#1", "a.npy#2", "b.npy#0"]


def test_bad_file_in_a_folder_is_answered_and_passed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2\n")
    os.utime(tmp_path / "a.csv", ns=(1_000, 1_000))
    put(tmp_path, "b.npy", 2_000)
    run = FolderRun(tmp_path, Mark())
    assert run.poll() == ["a.csv", "b.npy#0"]
    assert "error" in run.answers[0]


def test_labels_without_windows_are_said_once(tmp_path: Path) -> None:
    np.save(tmp_path / "a.labels.npy", np.array([1]))
    run = FolderRun(tmp_path, Mark())
    assert run.poll(polls=ORPHAN_POLLS - 2) == []
    run = FolderRun(tmp_path, Mark())
    assert run.poll(polls=3 * ORPHAN_POLLS) == ["a.labels.npy"]
    assert "there is no a.npy" in run.answers[0]["error"]


def test_labels_after_their_windows_are_said_once(tmp_path: Path) -> None:
    put(tmp_path, "a.npy", 1_000)
    run = FolderRun(tmp_path, Mark())

    def late() -> None:
        np.save(tmp_path / "a.labels.npy", np.array([1]))

    assert run.poll(lambda: None, lambda: None, late, polls=8) == ["a.npy#0", "a.labels.npy"]
    assert "after its windows were answered" in run.answers[1]["error"]


@pytest.mark.parametrize("name", ["missing", "notes.txt"])
def test_path_that_cannot_be_a_door_is_a_configuration_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigurationError) as caught:
        FileInput(tmp_path / name, print, input_shape=lambda: SHAPE, bookmark=Mark())
    assert caught.value.hint


# --- a topic ---


def test_topic_items_are_answered_on_the_answers_topic() -> None:
    broker = MemoryBroker(VirtualTime())
    sensor, heard = MemoryTransport(broker, "sensor"), list[dict[str, Any]]()

    def listen(event: object) -> None:
        packet = getattr(event, "packet", None)
        if packet is not None:
            heard.append(json.loads(packet.payload))

    sensor.start(listen, filters=[("gate/3/answers", 0)])
    answers: list[dict[str, Any]] = []
    door = TopicInput(MemoryTransport(broker, "door"), "gate/3", answers.append)
    steps = iter(
        [
            lambda: None,
            lambda: [sensor.publish(Packet("gate/3", p)) for p in (line(window=WINDOW, id="a"), b"nonsense")],
            lambda: None,
            lambda: None,
        ]
    )

    def should_stop() -> bool:
        step = next(steps, None)
        if step is not None:
            step()
        broker.pump()
        return step is None

    door.run(Ledger(), should_stop)
    broker.pump()
    assert [answer.get("label", "error") for answer in answers] == [0, "error"]
    assert heard == answers


def test_topic_that_is_flooded_drops_the_oldest_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from wire.transport import Received

    monkeypatch.setattr("edge_agent.inputs.topic.MAX_WAITING", 2)
    answers: list[dict[str, Any]] = []
    door = TopicInput(MemoryTransport(MemoryBroker(VirtualTime()), "door"), "t", answers.append)
    for name in "abc":
        door._deliver(Received(Packet("t", line(window=WINDOW, id=name))))
    assert door.dropped_total == 1
    asked = iter([False, False, True])
    door.run(Ledger(), lambda: next(asked))
    assert [answer["id"] for answer in answers] == ["b", "c"]


def npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def test_npy_payload_is_a_window() -> None:
    window = np.asfortranarray(np.arange(6, dtype=np.float64).reshape(SHAPE))
    item = read_payload(npy(window))
    assert item.window is not None
    assert (item.window.dtype, item.window.tolist(), item.label) == (np.float32, window.tolist(), None)


def huge_header() -> bytes:
    return npy(np.zeros(3)).replace(b"(3,)", b"(1000000000000,)")


@pytest.mark.parametrize(
    "data",
    [
        npy(np.ones(SHAPE))[:-1],
        npy(np.ones(SHAPE)) + b"x",
        npy(np.array([{}], dtype=object), allow_pickle=True),
        npy(np.array(["a"])),
        npy(np.ones((0, 3))),
        huge_header(),
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff{",
    ],
)
def test_npy_payload_that_is_damaged_is_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError):
        read_payload(data)


@given(st.binary(max_size=200))
def test_any_npy_bytes_are_a_window_or_a_data_error(data: bytes) -> None:
    with contextlib.suppress(DataError):
        read_payload(b"\x93NUMPY\x01\x00" + data)


@pytest.mark.parametrize(
    "url", ["mqtt://host", "mqtt://host:99999/t", "http://host/t", "mqtt://host/a/+/b", "mqtt://host/a#", "x"]
)
def test_url_that_names_no_topic_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_topic_url(url)


def test_topic_url_is_taken_apart() -> None:
    assert parse_topic_url("mqtt://broker:1884/gate/3") == ("broker", 1884, "gate/3")
    assert parse_topic_url("mqtt://broker/x")[1] == 1883
