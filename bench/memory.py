"""Resident memory of a real agent: without a model, with one, while it trains; against bare Python and a SuperNode.

Laws of the file: RSS of whole processes as the system counts it, the median of several readings when idle; a peak is
what the system recorded, not what sampling happened to see; the child of a self-test is a process of its own and has
ended by then.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import bare_training
from bench.flower_deployment import FlowerDeployment
from bench.one_device import initial_bundle, one_device
from bench.shoal_fleet import ShoalFleet
from bench.table import Row
from cloud_server.settings import RunSettings, TrainSettings
from edge_agent.rounds.learning import plan_batches
from fleet.processes import family, forget_peak, peak_mib, proportional_mib, resident_mib
from models.bundle import Bundle
from models.data import smartwatch
from models.data.federation import Federation
from wire.checkpoint import Checkpoint
from wire.manifest import TRAIN_SGD
from wire.messages import TrainConfig

MODEL = "watch_cnn1d"
ROUNDS = 3
# The agent gives memory back after two seconds without a job; the last release comes after the last round.
_SETTLE_SECONDS = 10.0
_NODE_SETTLE_SECONDS = 15.0
# Long enough to read the peak of the rounds that only train before the last one begins.
_PAUSE_SECONDS = 3.0
_READINGS = 15
_READING_SECONDS = 0.2
_TRAIN = TrainSettings(epochs=2, batch_size=16, learning_rate=0.02, momentum=0.9)


def measure() -> list[Row]:
    """Rows for one device of the smartwatch data."""
    federation = one_device(smartwatch.federation())
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        folder = Path(name)
        bundle = initial_bundle(federation, MODEL, folder / "bundle")
        bare = _bare_peak_mib(federation, bundle, folder)
        agent = _measure_agent(federation, bundle, folder)
        node = _measure_supernode(folder / "flower")
    return [
        Row("agent idle, no model: RSS", agent.without_model, "<= 64", "MiB"),
        Row(f"agent idle, {MODEL} loaded: RSS", agent.restarted, "<= 85", "MiB", "after a restart"),
        Row("agent idle after its first release: RSS", agent.with_model, "<= 85", "MiB", "not restarted"),
        Row(
            "agent idle after rounds: RSS",
            agent.after_rounds,
            "<= 85",
            "MiB",
            f"{ROUNDS} rounds, one release",
        ),
        Row(
            "agent training: peak RSS - bare onnxruntime's",
            agent.training_peak - bare,
            "<= 40",
            "MiB",
            f"{agent.training_peak:.1f} - {bare:.1f} MiB, same graph, samples and steps",
        ),
        Row(
            "agent in whole rounds: peak RSS",
            agent.round_peak,
            "",
            "MiB",
            "training, evaluation and a release; the self-test's child not counted",
        ),
        Row(
            "SuperNode idle / agent idle: RSS",
            node.resident / agent.with_model,
            note=f"{node.resident:.0f} MiB in {node.processes} processes / {agent.with_model:.0f} MiB in 1; "
            f"PSS {node.proportional:.0f} / {agent.proportional:.0f} MiB",
        ),
    ]


# ---- the agent -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AgentMemory:
    """MiB; RSS unless it says otherwise.

    Attributes:
        without_model: connected, before there is a release.
        with_model: after the first release was installed and every labelled window answered.
        proportional: PSS at the same time.
        training_peak: over the rounds that only train.
        round_peak: over the round that evaluates and releases, too.
        after_rounds: idle after them.
        restarted: started anew on its state folder, idle.
    """

    without_model: float
    with_model: float
    proportional: float
    training_peak: float
    round_peak: float
    after_rounds: float
    restarted: float


def _measure_agent(federation: Federation, bundle: Bundle, folder: Path) -> AgentMemory:
    run = RunSettings(
        name="bench",
        seed=1,
        rounds=ROUNDS,
        quorum=1,
        deadline_seconds=60.0,
        evaluate_every=ROUNDS,
        pause_seconds=_PAUSE_SECONDS,
        paused=True,
    )
    with ShoalFleet(folder, federation, run, _TRAIN) as fleet:
        agent = fleet.agents[0]
        fleet.wait(lambda: bool(agent.status().get("connected")))
        process_id = int(agent.status()["pid"])
        without_model = _idle_mib(process_id)
        fleet.import_model(bundle)
        with_model = _idle_mib(process_id)
        proportional = proportional_mib(process_id)
        forget_peak(process_id)
        fleet.resume()
        fleet.wait(lambda: _rounds_done(fleet) == ROUNDS - 1)
        training_peak = peak_mib(process_id)
        forget_peak(process_id)
        fleet.wait(lambda: fleet.cloud.is_finished)
        after_rounds = _idle_mib(process_id)
        round_peak = peak_mib(process_id)
        restarted = _restarted_mib(fleet)
    return AgentMemory(
        without_model, with_model, proportional, training_peak, round_peak, after_rounds, restarted
    )


def _rounds_done(fleet: ShoalFleet) -> int:
    return sum(row.state == "done" for row in fleet.cloud.rounds())


def _restarted_mib(fleet: ShoalFleet) -> float:
    """An agent that finds its model in its slot; it gets no window."""
    agent = fleet.restart_agent(0)
    fleet.wait(lambda: agent.status().get("status") == "running" and bool(agent.status().get("connected")))
    return _idle_mib(int(agent.status()["pid"]))


def _idle_mib(process_id: int) -> float:
    time.sleep(_SETTLE_SECONDS)
    readings = []
    for _ in range(_READINGS):
        time.sleep(_READING_SECONDS)
        readings.append(resident_mib(process_id))
    return statistics.median(readings)


# ---- what it is compared with ----------------------------------------------------------------------------------


def feeds_of(
    checkpoint: Checkpoint,
    opt_state_size: int,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    config: TrainConfig,
    seed: int,
) -> dict[str, Any]:
    """Every input of a train step graph for the steps that an agent would take."""
    plan = plan_batches(len(x), config, seed)
    return {
        "params": checkpoint.params,
        "opt_state": np.zeros(opt_state_size, np.float32),
        "buffers": checkpoint.buffers,
        "x": x,
        "y": y,
        "index": plan.index,
        "weights": plan.weights,
        "lr": np.array(config.learning_rate, np.float32),
        "momentum": np.array(config.momentum, np.float32),
        "weight_decay": np.array(config.weight_decay, np.float32),
        "mu": np.array(config.proximal_mu, np.float32),
        "anchor": checkpoint.params,
        "seed": np.array(seed, np.int64),
    }


def _bare_peak_mib(federation: Federation, bundle: Bundle, folder: Path) -> float:
    """Python, numpy and onnxruntime on the same graph, samples and plan as the agent's rounds that only train."""
    split = next(iter(federation.devices.values()))
    state_size = bundle.manifest.opt_state_sizes.sgd
    feeds = feeds_of(bundle.checkpoint(), state_size, split.train_x, split.train_y, _TRAIN.config(), seed=1)
    place = folder / "bare"
    place.mkdir()
    np.savez(place / "feeds.npz", **feeds)
    (place / "train.onnx").write_bytes(bundle.read(TRAIN_SGD))
    command = [sys.executable, bare_training.__file__, str(place), str(ROUNDS - 1)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return float(json.loads(done.stdout)["peak_kib"]) / 1024


@dataclass(frozen=True, slots=True)
class NodeMemory:
    """An idle SuperNode with the processes that it keeps: MiB of RSS and of PSS, and how many processes."""

    resident: float
    proportional: float
    processes: int


def _measure_supernode(folder: Path) -> NodeMemory:
    with FlowerDeployment(folder, 1) as deployment:
        time.sleep(_NODE_SETTLE_SECONDS)
        deployment.check()
        members = [member for member in family(deployment.node_process_ids) if resident_mib(member)]
        return NodeMemory(sum(map(resident_mib, members)), sum(map(proportional_mib, members)), len(members))
