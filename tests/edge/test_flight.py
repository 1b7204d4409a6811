"""A model that passes its self-test and then kills its process with a certain input: the device returns by itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.release.flight import DEATHS, NAME, WITHIN_SECONDS, FlightRecorder, go_back_after_deaths
from edge_agent.release.selftest import ChildSelfTest
from edge_agent.release.slots import Slots
from edge_agent.store.storage import MEMORY, open_database
from tests.edge.aggregator import Aggregator
from tests.edge.test_cli import end, enrolled, item, start
from tests.fuzz.models.seeds import FEATURES, Seed, seeds_by_hand
from tests.fuzz.models.trials import golden_inputs, release_of

__all__ = ["enrolled"]
DEADLINE_SECONDS = 90.0
SMALLEST = -(2.0**31)
USUAL, DEADLY = [0.25] * FEATURES, [SMALLEST] + [0.25] * (FEATURES - 1)
_RECORDED = """
import os, sys
from pathlib import Path
from edge_agent.release.flight import FlightRecorder
recorder = FlightRecorder(Path(sys.argv[1]))
for in_flight in eval(sys.argv[2]):
    recorder.note(in_flight)
os.abort()
"""


def killer(seed: Seed) -> bytes:
    """The seed's answers, and on the way to them a division of integers that no processor can do for one input."""
    model = onnx.ModelProto()
    model.ParseFromString(seed.int8)
    model.graph.node[-1].output[0] = "usual"
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(-1, np.int32), "minus_one"),
            numpy_helper.from_array(np.array(0.0, np.float32), "nothing"),
            numpy_helper.from_array(np.array([1], np.int64), "columns"),
        ]
    )
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT32),
            helper.make_node("Mod", ["whole", "minus_one"], ["divided"]),
            helper.make_node("Cast", ["divided"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["real", "nothing"], ["zeros"]),
            helper.make_node("ReduceSum", ["zeros", "columns"], ["zero"]),
            helper.make_node("Add", ["usual", "zero"], ["logits"]),
        ]
    )
    data: bytes = model.SerializeToString()
    return data


@pytest.fixture(scope="module")
def releases() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """A sound release, and one that passes the same self-test and kills."""
    from edge_agent.runtime import Runtime

    seed = seeds_by_hand()[0]
    answers = Runtime().load_inference(seed.int8).run(golden_inputs(seed))
    both = np.stack([answers, answers])
    deadly = killer(seed)
    return release_of(seed, seed.int8, seed.int8, 1, both), release_of(seed, deadly, deadly, 2, both)


def install(slots: Slots, files: dict[str, bytes], serial: int) -> None:
    staged = slots.stage(files, serial=serial)
    ChildSelfTest().check(staged.contents)
    slots.promote(staged)


def dies(state: Path) -> None:
    """One life of the agent, which its model ends."""
    process = start(state, "--input", "-")
    output, talk = process.communicate(
        item(window=USUAL, id="u") + item(window=DEADLY, id="d"), DEADLINE_SECONDS
    )
    assert process.returncode == -signal.SIGFPE, talk
    assert [json.loads(line)["release"] for line in output.splitlines()] == [2]


@pytest.mark.parametrize(
    ("is_trusted", "deaths"), [(False, 1), pytest.param(True, DEATHS, marks=pytest.mark.slow)]
)
def test_agent_that_its_model_kills_returns_to_the_last_good_release(
    enrolled: Path,
    aggregator: Aggregator,
    releases: tuple[dict[str, bytes], dict[str, bytes]],
    is_trusted: bool,
    deaths: int,
) -> None:
    slots = Slots(enrolled)
    install(slots, releases[0], 1)
    slots.confirm()
    install(slots, releases[1], 2)
    if is_trusted:
        slots.confirm()
    for _ in range(deaths):
        dies(enrolled)
    process = start(enrolled, "--input", "-")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(item(window=DEADLY, id="d") + item(window=USUAL, id="u"))
    process.stdin.flush()
    answers = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert [answer["release"] for answer in answers] == [1, 1]
    assert "the agent died while it answered" in end(process)[1]


# ---- what counts as such a death -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noted", "is_death"), [("(1,)", True), ("(1, 2, 1)", True), ("(1, 0)", False), ("()", False)]
)
def test_only_an_end_in_the_middle_of_an_answer_counts(tmp_path: Path, noted: str, is_death: bool) -> None:
    subprocess.run([sys.executable, "-c", _RECORDED, str(tmp_path), noted], check=False)
    assert FlightRecorder(tmp_path).died_answering is is_death
    assert not FlightRecorder(tmp_path).died_answering


@pytest.mark.parametrize("left", [b"", b"\1", b"\1" + b"another boot of the machine, long ago", bytes(100)])
def test_what_another_boot_or_nobody_left_says_nothing(tmp_path: Path, left: bytes) -> None:
    (tmp_path / NAME).write_bytes(left)
    assert not FlightRecorder(tmp_path).died_answering


def test_recorder_without_a_folder_costs_no_answer(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "nowhere")
    recorder.note(1)
    assert not recorder.died_answering


def test_trusted_release_goes_back_after_deaths_that_follow_each_other_only(
    tmp_path: Path, releases: tuple[dict[str, bytes], dict[str, bytes]]
) -> None:
    slots, database = Slots(tmp_path), open_database(MEMORY)
    for serial, files in enumerate(releases, 1):
        slots.promote(slots.stage(files, serial=serial))
        slots.confirm()
    recorder, times = FlightRecorder(tmp_path), [1e9]
    assert not go_back_after_deaths(recorder, slots, database, lambda: times[-1])
    recorder.died_answering = True
    for _ in range(2 * DEATHS):
        assert not go_back_after_deaths(recorder, slots, database, lambda: times[-1])
        times.append(times[-1] + WITHIN_SECONDS / (DEATHS - 1) + 1.0)
    times.append(times[-1] + WITHIN_SECONDS)
    went = [go_back_after_deaths(recorder, slots, database, lambda: times[-1]) for _ in range(DEATHS)]
    assert went == [False] * (DEATHS - 1) + [True]
    current = slots.current()
    assert current is not None
    assert current.version == 1
