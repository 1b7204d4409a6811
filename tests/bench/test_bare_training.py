"""What an agent's memory is compared with runs the same steps as the agent, and imports nothing of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench import bare_training
from bench.memory import feeds_of
from edge_agent.rounds.learning import train
from edge_agent.runtime import Runtime
from models.flat import flatten_params
from models.task import Task
from models.train_step import TrainStepExport, export_train_step
from wire.checkpoint import Checkpoint
from wire.messages import TrainConfig

CONFIG = TrainConfig(epochs=3, batch_size=4, learning_rate=0.1, momentum=0.9)
SEED = 7


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3))


@pytest.fixture(scope="module")
def export(module: nn.Module) -> TrainStepExport:
    return export_train_step(module, Task.classification(3), (5,))


@pytest.fixture(scope="module")
def head(module: nn.Module) -> Checkpoint:
    return Checkpoint(flatten_params(module), np.zeros(0, np.float32), np.zeros((0, 2), np.float32))


@pytest.fixture(scope="module")
def feeds(head: Checkpoint, export: TrainStepExport) -> dict[str, Any]:
    return feeds_of(head, export.opt_state_size, *samples(), CONFIG, SEED)


def samples() -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((10, 5)).astype(np.float32), rng.integers(0, 3, 10)


def test_bare_training_makes_the_update_that_an_agent_makes(
    export: TrainStepExport, head: Checkpoint, feeds: dict[str, Any]
) -> None:
    session = Runtime().load_train(export.model)
    agents = train(session, head, export.opt_state_size, *samples(), CONFIG, SEED).update
    bare = bare_training.train(export.model, feeds, rounds=2)["params"] - head.params
    assert np.abs(agents).max() > 0.01
    np.testing.assert_array_equal(bare, agents)


def test_bare_training_tells_its_peak_and_imports_nothing_of_ours(
    export: TrainStepExport, feeds: dict[str, Any], tmp_path: Path
) -> None:
    np.savez(tmp_path / "feeds.npz", **feeds)
    (tmp_path / "train.onnx").write_bytes(export.model)
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['bare_training', {str(tmp_path)!r}, '1']\n"
        f"runpy.run_path({bare_training.__file__!r}, run_name='__main__')\n"
        "ours = {'wire', 'process', 'edge_agent', 'models', 'cloud_server', 'fleet', 'torch'}\n"
        "print(sorted(ours & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    peak, ours = done.stdout.splitlines()
    assert json.loads(peak)["peak_kib"] > 20 * 1024
    assert ours == "[]"
