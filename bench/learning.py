"""What a fleet learns: accuracy of the first bundle and of the last release, over seeds, on windows nobody trained on.

Played by the simulation (the real agents, aggregator and int8 files, on virtual time) with the demo's own settings;
each seed draws weights, cohorts and codec noise anew. Nothing is tuned on the reported windows: settings were chosen
on validation windows.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.table import Row
from cloud_server.assembly import RunConfig
from cloud_server.release.gate import GatePolicy
from cloud_server.rounds.state import RoundPolicy
from edge_agent.settings import EdgeSettings, ReportSettings
from fleet.books import Judge, read_books
from fleet.demo import DATASETS, MAX_OPERATOR_DROP, MIN_GAIN
from fleet.simulation import Simulation
from models.first_bundle import make_first_bundle

_RUN = "bench"


def measure() -> list[Row]:
    """The smartwatch fleet: 16 devices, 20 rounds, 5 seeds."""
    return learning_rows("smartwatch", rounds=20, seeds=(1, 2, 3, 4, 5), goal=0.84, gain_goal=15.0)


def learning_rows(
    dataset: str, *, rounds: int, seeds: tuple[int, ...], goal: float, gain_goal: float | None
) -> list[Row]:
    """Rows of one data set: median accuracy with its spread, gain, bytes, hold-backs."""
    runs = []
    for seed in seeds:
        runs.append(play(dataset, rounds=rounds, seed=seed))
        print(f"{dataset}, seed {seed}: {runs[-1][0]:.3f} -> {runs[-1][1]:.3f}", file=sys.stderr)
    first, last = [run[0] for run in runs], [run[1] for run in runs]
    gains = [100 * (after - before) for before, after in zip(first, last, strict=True)]
    note = f"{rounds} rounds, seeds {seeds}: {', '.join(f'{value:.3f}' for value in last)}"
    rows = [
        Row(
            f"{dataset}: int8 accuracy, first bundle", statistics.median(first), unit="", note=_spread(first)
        ),
        Row(f"{dataset}: int8 accuracy, last release", statistics.median(last), f">= {goal}", "", note),
        Row(
            f"{dataset}: update bytes / float32",
            max(run[2] for run in runs),
            "<= 0.065",
            note="sealed, worst seed",
        ),
        Row(f"{dataset}: rounds held back by the gate", statistics.median(run[3] for run in runs), unit=""),
    ]
    if gain_goal is not None:
        rows.insert(
            2,
            Row(
                f"{dataset}: gain in points", statistics.median(gains), f">= {gain_goal}", "", _spread(gains)
            ),
        )
    return rows


def play(dataset: str, *, rounds: int, seed: int) -> tuple[float, float, float, int]:
    """One run: accuracy of the first bundle and of the last release, bytes ratio, rounds held back."""
    plan = DATASETS[dataset]
    federation = plan.load(seed)
    devices = len(federation.devices)
    config = RunConfig(
        run=_RUN,
        policy=RoundPolicy(quorum=max(1, devices // 2), rounds=rounds, round_seconds=600.0),
        train=plan.train.config(),
        gate=GatePolicy(min_gain=MIN_GAIN, max_operator_drop=MAX_OPERATOR_DROP),
    )
    settings = EdgeSettings(report=ReportSettings(telemetry_seconds=3600.0, inference_seconds=3600.0))
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        bundle = make_first_bundle(federation, plan.model, Path(folder) / "bundle", seed=seed)
        simulation = Simulation(federation, bundle, config, seed=seed, settings=settings)
        simulation.run()
        with simulation.base.database.read() as connection:
            books = read_books(connection, _RUN)
        judge = Judge(bundle, simulation.base.publisher.checkpoint)
        x = np.concatenate([split.test_x for split in federation.devices.values()])
        y = np.concatenate([split.test_y for split in federation.devices.values()])
        accuracies = [judge.score(row.version, x, y) for row in (books.released[0], books.released[-1])]
        simulation.close()
    updates = [update for rows in books.updates.values() for update in rows]
    ratio = sum(update.size_bytes for update in updates) / (len(updates) * 4 * judge.params_size)
    held = sum(row.state == "done" for row in books.rounds) - (len(books.released) - 1)
    return accuracies[0], accuracies[1], ratio, held


def _spread(values: list[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"
