"""One train step of every zoo model: the exported graph under onnxruntime against eager torch, one thread each.

Above 1 the device, which has no torch, is the faster one. Both sides take the same steps over the same
samples. Then what DP-SGD costs: the usual graph against the private one, noise included.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bench.table import Row, interleaved_medians
from edge_agent.rounds.sample_noise import SampleNoise
from models import ort
from models.flat import flatten_buffers, flatten_params
from models.train_step import SamplePrivacy, TrainStepExport, export_train_step
from models.zoo import ZOO, ZooModel, load

BATCH = 32
STEPS = 10
SAMPLES = 512
REPEATS = 25
LEARNING_RATE = 0.01
MOMENTUM = 0.9
GOAL = ">= 0.8"
# A batch's products are done one by one: what is left of the usual speed.
PRIVATE_GOALS = {"watch_cnn1d": ">= 0.2", "fashion_cnn": ">= 0.3"}
GOALS = {"digits_mlp": ">= 1.0", "watch_cnn1d": ">= 1.0", "tiny_transformer": ">= 1.0"}


def measure() -> list[Row]:
    """A row for each model of the zoo, and one for each that is measured privately."""
    torch.set_num_threads(1)
    rows = [_measure_model(load(name)) for name in ZOO]
    return rows + [_measure_privacy(load(name), goal) for name, goal in PRIVATE_GOALS.items()]


def _measure_privacy(entry: ZooModel, goal: str) -> Row:
    torch.manual_seed(0)
    module = entry.make_model()
    usual, private = (
        export_train_step(module, entry.task, entry.input_shape, privacy=privacy)
        for privacy in (None, SamplePrivacy(1.0, 1.0))
    )
    x, y, index = _samples(entry)
    usual_seconds, private_seconds = interleaved_medians(
        _ort_steps(usual, module, x, y, index), _ort_steps(private, module, x, y, index), repeats=REPEATS
    )
    milliseconds = [1000 * seconds / STEPS for seconds in (usual_seconds, private_seconds)]
    return Row(
        f"DP-SGD step of {entry.name}: usual / private",
        usual_seconds / private_seconds,
        goal,
        note=f"batch {BATCH}, {STEPS} steps a run, {milliseconds[0]:.2f} / {milliseconds[1]:.2f} ms a step",
    )


def _samples(entry: ZooModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, *entry.input_shape)).astype(np.float32)
    y = rng.integers(0, max(entry.task.classes, 1), SAMPLES)
    return x, y, rng.permutation(SAMPLES)[: STEPS * BATCH].reshape(STEPS, BATCH)


def _measure_model(entry: ZooModel) -> Row:
    torch.manual_seed(0)
    module = entry.make_model()
    export = export_train_step(module, entry.task, entry.input_shape)
    x, y, index = _samples(entry)
    torch_seconds, ort_seconds = interleaved_medians(
        _torch_steps(module, entry, x, y, index), _ort_steps(export, module, x, y, index), repeats=REPEATS
    )
    milliseconds = [1000 * seconds / STEPS for seconds in (torch_seconds, ort_seconds)]
    return Row(
        f"train step of {entry.name}: torch / onnxruntime",
        torch_seconds / ort_seconds,
        GOALS.get(entry.name, GOAL),
        note=f"batch {BATCH}, {STEPS} steps a run, {milliseconds[0]:.2f} / {milliseconds[1]:.2f} ms a step",
    )


def _torch_steps(
    module: nn.Module, entry: ZooModel, x: np.ndarray, y: np.ndarray, index: np.ndarray
) -> Callable[[], None]:
    samples, labels, batches = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(index)
    optimizer = torch.optim.SGD(module.parameters(), LEARNING_RATE, MOMENTUM)
    module.train()

    def run() -> None:
        for batch in batches:
            inputs = samples[batch]
            optimizer.zero_grad()
            outputs = module(inputs)
            if entry.task.kind == "classification":
                loss = functional.cross_entropy(outputs, labels[batch])
            else:
                loss = functional.mse_loss(outputs, inputs)
            torch.autograd.backward(loss)
            optimizer.step()

    return run


def _ort_steps(
    export: TrainStepExport, module: nn.Module, x: np.ndarray, y: np.ndarray, index: np.ndarray
) -> Callable[[], None]:
    session = ort.make_session(export.model)
    params = flatten_params(module)
    zero = np.array(0.0, np.float32)
    feeds = {
        "params": params,
        "opt_state": np.zeros(export.opt_state_size, np.float32),
        "buffers": flatten_buffers(module),
        "x": x,
        "y": y,
        "weights": np.ones(index.shape, np.float32),
        "index": index,
        "lr": np.array(LEARNING_RATE, np.float32),
        "momentum": np.array(MOMENTUM, np.float32),
        "weight_decay": zero,
        "mu": zero,
        "anchor": params,
        "seed": np.array(0, np.int64),
    }
    noise = SampleNoise(os.urandom)
    takes_noise = "noise" in export.inputs

    def run() -> None:
        if takes_noise:
            feeds["noise"] = noise.take(len(index), params.size)
        outputs = ort.run(session, feeds)
        feeds["params"], feeds["opt_state"] = outputs["params_out"], outputs["opt_state_out"]

    return run
