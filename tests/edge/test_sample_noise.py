"""The noise of DP-SGD on a device: standard normal, from a secret of its own, another one for every step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from edge_agent.ports import TrainInputs
from edge_agent.rounds.learning import train
from edge_agent.rounds.sample_noise import SampleNoise
from edge_agent.runtime import Runtime
from models.flat import flatten_params
from models.task import Task
from models.train_step import SamplePrivacy, TrainStepExport, export_train_step
from wire.checkpoint import Checkpoint
from wire.errors import ModelError
from wire.messages import TrainConfig

CONFIG = TrainConfig(epochs=5, batch_size=4, learning_rate=0.1, clipping_norm=1000.0)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3))


@pytest.fixture(scope="module")
def export(module: nn.Module) -> TrainStepExport:
    return export_train_step(module, Task.classification(3), (5,), "sgd", SamplePrivacy(0.5, 1.0))


def seed_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def trained(export: TrainStepExport, module: nn.Module, number: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    head = Checkpoint(flatten_params(module), np.zeros(0, np.float32), np.zeros((0, 2), np.float32))
    x, y = rng.standard_normal((10, 5)).astype(np.float32), rng.integers(0, 3, 10)
    session = Runtime().load_train(export.model)
    return train(
        session, head, export.opt_state_size, x, y, CONFIG, 7, random=lambda _: seed_of(number)
    ).update


def test_noise_is_standard_normal() -> None:
    noise = np.sort(SampleNoise(lambda _: seed_of(3)).take(100, 2001).reshape(-1).astype(np.float64))
    expected = torch.special.ndtr(torch.from_numpy(noise)).numpy()
    distance = np.abs(expected - (np.arange(noise.size) + 0.5) / noise.size).max()
    # Kolmogorov and Smirnov's bound at 1e-6.
    assert distance < 2.7 / math.sqrt(noise.size)


def test_no_step_has_the_noise_of_another() -> None:
    stream = SampleNoise(lambda _: seed_of(3))
    taken = np.concatenate([stream.take(3, 5), stream.take(2, 5)])
    assert len(np.unique(taken)) == taken.size


def test_secret_of_the_device_decides_and_the_clouds_seed_does_not(
    export: TrainStepExport, module: nn.Module
) -> None:
    first = trained(export, module, 1)
    np.testing.assert_array_equal(first, trained(export, module, 1))
    assert np.abs(first - trained(export, module, 2)).min() > 0


def test_seed_is_32_bytes_of_the_source(export: TrainStepExport, module: nn.Module) -> None:
    asked: list[int] = []

    def random(count: int) -> bytes:
        asked.append(count)
        return seed_of(1)

    SampleNoise(random).take(1, 3)
    assert asked == [32]


def test_graph_without_its_noise_does_not_run(export: TrainStepExport, module: nn.Module) -> None:
    session = Runtime().load_train(export.model)
    assert session.takes_noise
    params = flatten_params(module)
    inputs = TrainInputs(
        params=params,
        opt_state=np.zeros(export.opt_state_size, np.float32),
        buffers=np.zeros(0, np.float32),
        x=np.zeros((2, 5), np.float32),
        y=np.zeros(2, np.int64),
        weights=np.ones((1, 2), np.float32),
        index=np.arange(2)[None],
        lr=0.1,
        momentum=0.0,
        weight_decay=0.0,
        mu=0.0,
        anchor=params,
        seed=1,
    )
    with pytest.raises(ModelError, match="noise"):
        session.run(inputs)
