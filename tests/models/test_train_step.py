"""The exported train step: its contract, its determinism, and that its check against torch can fail."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import nn

from models import ort
from models.flat import flatten_buffers, flatten_params, load_flat
from models.task import Task
from models.train_step import TrainStepExport, export_train_step, verify_train_step
from models.zoo import ZOO, load
from wire.errors import ConfigurationError, ModelError

WATCH = load("watch_cnn1d")
Arrays = dict[str, npt.NDArray[Any]]


class Tiny(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


@pytest.fixture(scope="module")
def watch() -> nn.Module:
    torch.manual_seed(0)
    return WATCH.make_model()


@pytest.fixture(scope="module")
def exported(watch: nn.Module) -> TrainStepExport:
    return export_train_step(watch, WATCH.task, WATCH.input_shape)


def feeds_for(export: TrainStepExport, module: nn.Module, steps: int, batch: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    samples = steps * batch + 3
    params = flatten_params(module)
    return {
        "params": params,
        "opt_state": np.zeros(export.opt_state_size, np.float32),
        "buffers": flatten_buffers(module),
        "x": rng.normal(size=(samples, *export.input_shape)).astype(np.float32),
        "y": rng.integers(0, 3, samples),
        "weights": np.ones((steps, batch), np.float32),
        "index": rng.integers(0, samples, (steps, batch)),
        "lr": np.array(0.05, np.float32),
        "momentum": np.array(0.9, np.float32),
        "weight_decay": np.array(0.0, np.float32),
        "mu": np.array(0.0, np.float32),
        "anchor": params,
        "seed": np.array(7, np.int64),
    }


def test_graph_has_the_inputs_and_outputs_of_the_contract(exported: TrainStepExport) -> None:
    graph = onnx.load_from_string(exported.model).graph
    outputs = [value.name for value in graph.output]
    assert outputs == ["params_out", "opt_state_out", "buffers_out", "loss", "metric"]
    inputs = "params opt_state x y weights index lr momentum weight_decay mu anchor"
    assert exported.inputs == tuple(inputs.split())
    assert {node.domain for node in graph.node} == {""}


def test_graph_has_no_fixed_batch_or_number_of_steps(exported: TrainStepExport, watch: nn.Module) -> None:
    session = ort.make_session(exported.model)
    for steps, batch in ((1, 1), (2, 7), (4, 3)):
        outputs = ort.run(session, feeds_for(exported, watch, steps, batch))
        assert outputs["loss"].shape == outputs["metric"].shape == (steps,)
        assert outputs["params_out"].shape == (exported.params_size,)
        assert outputs["buffers_out"].shape == (0,)
        assert not np.array_equal(outputs["params_out"], flatten_params(watch))


def test_graph_learns(exported: TrainStepExport, watch: nn.Module) -> None:
    feeds = feeds_for(exported, watch, 60, 8)
    feeds["index"] = np.tile(np.arange(8), (60, 1))
    outputs = ort.run(ort.make_session(exported.model), feeds)
    assert outputs["loss"][-1] < 0.2 * outputs["loss"][0]
    assert outputs["metric"][-1] == 1


def test_padding_does_not_count(exported: TrainStepExport, watch: nn.Module) -> None:
    session = ort.make_session(exported.model)
    short = feeds_for(exported, watch, 1, 5)
    padded = dict(short)
    padded["index"] = np.pad(short["index"], ((0, 0), (0, 3)))
    padded["weights"] = np.pad(short["weights"], ((0, 0), (0, 3)))
    expected, actual = ort.run(session, short), ort.run(session, padded)
    np.testing.assert_allclose(actual["params_out"], expected["params_out"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["digits_mlp", *[pytest.param(n, marks=pytest.mark.slow) for n in sorted(set(ZOO) - {"digits_mlp"})]],
)
def test_export_has_the_same_bytes_in_another_process(name: str) -> None:
    code = (
        "import hashlib, sys; from models.zoo import load; from models.train_step import export_train_step; "
        "w = load(sys.argv[1]); e = export_train_step(w.make_model(), w.task, w.input_shape); "
        "print(hashlib.sha256(e.model).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, check=True
    )
    entry = load(name)
    exported = export_train_step(entry.make_model(), entry.task, entry.input_shape)
    assert done.stdout.strip() == hashlib.sha256(exported.model).hexdigest()


@pytest.mark.parametrize(("optimizer", "norm"), [("sgd", True), ("adam", False)])
def test_export_leaves_the_module_and_states_its_sizes(optimizer: str, norm: bool) -> None:
    module = Tiny(norm).eval()
    before = flatten_params(module), flatten_buffers(module)
    export = export_train_step(module, Task.classification(3), (5,), optimizer)
    assert not module.training
    np.testing.assert_array_equal(flatten_params(module), before[0])
    np.testing.assert_array_equal(flatten_buffers(module), before[1])
    size = flatten_params(module).size
    assert export.params_size == size
    assert export.opt_state_size == (size if optimizer == "sgd" else 2 * size + 1)
    assert export.buffers_size == (16 if norm else 0)
    outputs = ort.run(ort.make_session(export.model), feeds_for(export, module, 2, 4))
    assert outputs["opt_state_out"].shape == (export.opt_state_size,)
    assert outputs["buffers_out"].shape == (export.buffers_size,)
    if optimizer == "adam":
        assert outputs["opt_state_out"][-1] == 2


def test_anomaly_task_trains_without_labels() -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))
    export = export_train_step(module, Task.anomaly(), (5,))
    assert "y" not in export.inputs
    outputs = ort.run(ort.make_session(export.model), feeds_for(export, module, 30, 16))
    assert outputs["loss"][-1] < outputs["loss"][0]
    np.testing.assert_array_equal(outputs["loss"], outputs["metric"])


def test_verify_refuses_a_graph_with_wrong_gradients(exported: TrainStepExport, watch: nn.Module) -> None:
    model = onnx.load_from_string(exported.model)
    loop = next(node for node in model.graph.node if node.op_type == "Loop")
    body = loop.attribute[0].g
    mask = next(node for node in body.node if node.op_type == "HardSigmoid")
    next(attribute for attribute in mask.attribute if attribute.name == "beta").f = 1.0
    broken = dataclasses.replace(exported, model=model.SerializeToString())
    with pytest.raises(ModelError) as caught:
        verify_train_step(broken, watch, WATCH.task)
    assert caught.value.facts["difference"] > 1e-2


def test_verify_refuses_a_graph_of_another_loss(exported: TrainStepExport, watch: nn.Module) -> None:
    """What this guards against: gradients that are the batch size times too large, without an error."""
    model = onnx.load_from_string(exported.model)
    body = next(node for node in model.graph.node if node.op_type == "Loop").attribute[0].g
    shares = next(node for node in body.node if node.op_type == "Div" and node.input[0] == "batch_weights")
    shares.op_type = "Mul"
    broken = dataclasses.replace(exported, model=model.SerializeToString())
    with pytest.raises(ModelError, match="differs from torch"):
        verify_train_step(broken, watch, WATCH.task)


def test_export_refuses_a_module_that_does_not_fit_the_task() -> None:
    with pytest.raises(ModelError, match="task needs"):
        export_train_step(Tiny(), Task.classification(4), (5,))
    with pytest.raises(ModelError, match="input of shape"):
        export_train_step(Tiny(), Task.classification(3), (6,))


def test_export_refuses_a_fixed_batch() -> None:
    class Fixed(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.reshape(x.shape[0], 5)) * (1.0 if x.shape[0] == 6 else 2.0)

    with pytest.raises(ModelError, match="batch of"):
        export_train_step(Fixed(), Task.classification(3), (5,))


def test_export_refuses_an_unknown_optimizer() -> None:
    with pytest.raises(ConfigurationError, match="lamb"):
        export_train_step(Tiny(), Task.classification(3), (5,), "lamb")


def test_export_refuses_a_frozen_module() -> None:
    with pytest.raises(ModelError, match="no trainable"):
        export_train_step(Tiny().requires_grad_(False), Task.classification(3), (5,))


def test_flat_round_trip() -> None:
    source, target = Tiny(norm=True), Tiny(norm=True)
    load_flat(target, flatten_params(source), flatten_buffers(source))
    np.testing.assert_array_equal(flatten_params(target), flatten_params(source))
    with pytest.raises(ModelError, match="shape"):
        load_flat(target, flatten_params(source)[1:])
