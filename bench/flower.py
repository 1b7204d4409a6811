"""One round against Flower's own deployment: time, CPU and bytes, on the same model, machine and loopback.

Flower's clients add noise and do not train; Shoal's devices train one step, clip, compress, seal and sign, and every
update is committed to a database before its receipt leaves. Laws of the file: the same number of rounds, devices and
parameters on both sides; a first round warms each side up and is in no figure; whatever rounds up or down does so
against Shoal (its CPU time is read before the warm-up round ended and after the last did, Flower's between the two);
no evaluation on either side.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bench.flower_deployment import FlowerDeployment, Mark
from bench.private_network import in_private_network
from bench.shoal_fleet import ShoalFleet
from bench.table import Row
from cloud_server.db import rounds as books
from cloud_server.settings import RunSettings, TrainSettings
from fleet.processes import cpu_seconds, loopback_bytes
from models.build import build_bundle
from models.bundle import Bundle
from models.data.federation import Federation, Split
from models.task import Task

ROUNDS = 5
WARM_UP_ROUNDS = 1
NODES = (4, 10)
CLASSES = 10
SAMPLES = 8
_BYTES_PER_VALUE = 4
_TRAIN = TrainSettings(epochs=1, batch_size=SAMPLES, learning_rate=0.01)
_GOALS = {("10 MB", 10): (">= 10", ">= 16")}


@dataclass(frozen=True, slots=True)
class Size:
    """A two-layer perceptron of a given number of parameters.

    Attributes:
        name: its size as float32.
        inputs, hidden: hidden · (inputs + 1 + CLASSES) + CLASSES parameters.
    """

    name: str
    inputs: int
    hidden: int

    @property
    def params(self) -> int:
        return self.hidden * (self.inputs + 1 + CLASSES) + CLASSES


SIZES = (Size("20 kB", 488, 10), Size("10 MB", 2494, 998))
STRATEGY = "FedAvg"
"""As the app that Flower's deployment runs: the robust rule that is Shoal's default is work that Flower does not do."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What rounds cost.

    Attributes:
        round_seconds: median from one round's beginning to the next one's, or to its end for the last.
        cpu_seconds: of all processes, per round.
        node_bytes: through loopback, per node and round.
        update_bytes: one sealed update; 0 for Flower.
    """

    round_seconds: float
    cpu_seconds: float
    node_bytes: float
    update_bytes: float = 0.0


def measure(nodes: Sequence[int] = NODES, sizes: Sequence[Size] = SIZES, rounds: int = ROUNDS) -> list[Row]:
    """Rows for every number of nodes and every size."""
    return in_private_network("bench.flower", "compare", [list(nodes), [size.name for size in sizes], rounds])


def compare(nodes: Sequence[int], size_names: Sequence[str], rounds: int) -> list[Row]:
    """As `measure`, on the loopback interface that this process has."""
    sizes = [size for size in SIZES if size.name in size_names]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        folder = Path(name)
        bundles = {size: _bundle(size, folder / f"bundle-{size.params}") for size in sizes}
        for count in nodes:
            flower = _flower_costs(folder / f"flower-{count}", count, sizes, rounds)
            for size in sizes:
                place = folder / f"shoal-{count}-{size.params}"
                ours = _shoal_cost(place, count, size, bundles[size], rounds)
                rows += compare_costs(count, size, rounds, flower[size], ours)
    return rows


def compare_costs(count: int, size: Size, rounds: int, flower: Cost, ours: Cost) -> list[Row]:
    """The rows of one size and number of nodes."""
    what = f"{size.name}, {count} nodes"
    time_goal, cpu_goal = _GOALS.get((size.name, count), ("", ""))
    float32_bytes = _BYTES_PER_VALUE * size.params
    return [
        Row(
            f"round time, {what}: Flower / Shoal",
            flower.round_seconds / ours.round_seconds,
            time_goal,
            note=f"{flower.round_seconds:.2f} / {ours.round_seconds:.2f} s, median of {rounds} rounds",
        ),
        Row(
            f"CPU, {what}: Flower / Shoal",
            flower.cpu_seconds / ours.cpu_seconds,
            cpu_goal,
            note=f"{flower.cpu_seconds:.2f} / {ours.cpu_seconds:.2f} s a round, all processes",
        ),
        Row(
            f"bytes, {what}: Flower / Shoal",
            flower.node_bytes / ours.node_bytes,
            note=f"{flower.node_bytes / 1e3:.0f} / {ours.node_bytes / 1e3:.0f} kB per node and round on loopback",
        ),
        Row(
            f"update, {what}: sealed bytes / float32",
            ours.update_bytes / float32_bytes,
            "<= 0.065" if size.name == "10 MB" else "",
            note=f"{ours.update_bytes:.0f} of {float32_bytes} bytes",
        ),
    ]


# ---- Flower ----------------------------------------------------------------------------------------------------


def _flower_costs(folder: Path, count: int, sizes: Sequence[Size], rounds: int) -> dict[Size, Cost]:
    with FlowerDeployment(folder, count) as deployment:
        return {size: _flower_cost(deployment, count, size, rounds) for size in sizes}


def _flower_cost(deployment: FlowerDeployment, count: int, size: Size, rounds: int) -> Cost:
    readings: list[tuple[float, int]] = []
    first, last = WARM_UP_ROUNDS + 1, WARM_UP_ROUNDS + rounds

    def read(mark: Mark) -> None:
        if (mark.what, mark.round) in (("begin", first), ("end", last)):
            readings.append((cpu_seconds(deployment.process_ids), loopback_bytes()))

    marks = deployment.run(size.params, last, read)
    begins = [mark.time for mark in marks if mark.what == "begin" and mark.round >= first]
    (cpu, bytes_), (cpu_after, bytes_after) = readings
    return Cost(
        _median_round(begins, marks[-1].time),
        (cpu_after - cpu) / rounds,
        (bytes_after - bytes_) / rounds / count,
    )


# ---- Shoal -----------------------------------------------------------------------------------------------------


def _shoal_cost(folder: Path, count: int, size: Size, bundle: Bundle, rounds: int) -> Cost:
    run = RunSettings(
        name="bench",
        seed=1,
        rounds=WARM_UP_ROUNDS + rounds,
        quorum=count,
        strategy=STRATEGY,
        deadline_seconds=120.0,
        evaluate_every=0,
        paused=True,
    )
    with ShoalFleet(folder, _federation(size, count), run, _TRAIN) as fleet:
        fleet.import_model(bundle)
        processes = fleet.process_ids()
        cpu, bytes_ = 0.0, 0

        def is_warm() -> bool:
            nonlocal cpu, bytes_
            done = [row for row in fleet.cloud.rounds() if row.state == "done"]
            if len(done) < WARM_UP_ROUNDS:
                cpu, bytes_ = cpu_seconds(processes), loopback_bytes()
            return len(done) >= WARM_UP_ROUNDS

        fleet.resume()
        fleet.wait(is_warm)
        fleet.wait(lambda: fleet.cloud.is_finished)
        cpu, bytes_ = cpu_seconds(processes) - cpu, loopback_bytes() - bytes_
        rows = [row for row in fleet.cloud.rounds() if row.state == "done"][WARM_UP_ROUNDS:]
        updates = _update_sizes(fleet)
    begins = [row.started for row in rows]
    return Cost(
        _median_round(begins, rows[-1].ended),
        cpu / len(rows),
        bytes_ / len(rows) / count,
        statistics.median(updates),
    )


def _update_sizes(fleet: ShoalFleet) -> list[int]:
    """Bytes of every sealed update that was folded."""
    run = fleet.cloud.settings.run.name
    with fleet.cloud.deployment.database.read() as connection:
        return [
            update.size_bytes
            for row in books.load_rounds(connection, run)
            for update in books.load_updates(connection, run, row.number, "train", "folded")
        ]


def _median_round(begins: Sequence[float], end: float) -> float:
    ends = [*begins[1:], end]
    return statistics.median(after - before for before, after in zip(begins, ends, strict=True))


def _bundle(size: Size, folder: Path) -> Bundle:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = nn.Sequential(nn.Linear(size.inputs, size.hidden), nn.ReLU(), nn.Linear(size.hidden, CLASSES))
    x = np.random.default_rng(0).standard_normal((64, size.inputs)).astype(np.float32)
    task = Task.classification(CLASSES)
    return build_bundle(module, task, (size.inputs,), x, name="perceptron", out_dir=folder)


def _federation(size: Size, count: int) -> Federation:
    """A few random samples for each device: enough for one step."""
    rng = np.random.default_rng(0)

    def split() -> Split:
        x = rng.standard_normal((SAMPLES + 1, size.inputs)).astype(np.float32)
        y = rng.integers(0, CLASSES, SAMPLES)
        none_x, none_y = np.zeros((0, size.inputs), np.float32), np.zeros(0, np.int64)
        return Split(x[:SAMPLES], y, none_x, none_y, x[SAMPLES:], y[:1])

    operator = split()
    labels = tuple(str(number) for number in range(CLASSES))
    devices = {f"device-{number}": split() for number in range(count)}
    return Federation("random", labels, (size.inputs,), operator, devices)
