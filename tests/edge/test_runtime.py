"""The device's door to ONNX Runtime: what it loads, what it refuses, what it shares."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.ports import TrainInputs
from edge_agent.runtime import Runtime, choose_variant
from models.bundle import Bundle
from wire.errors import DataError, ModelError
from wire.manifest import FLOAT32, TRAIN_ADAM, TRAIN_SGD
from wire.materialize import materialize_float32


def linear(scale: float = 1.0) -> onnx.ModelProto:
    """y = x · (scale · I), 4 → 4."""
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32) * scale, "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def train_inputs(bundle: Bundle, steps: int = 3) -> TrainInputs:
    checkpoint = bundle.checkpoint()
    rng = np.random.default_rng(1)
    return TrainInputs(
        params=checkpoint.params,
        opt_state=np.zeros(bundle.manifest.opt_state_sizes.sgd, np.float32),
        buffers=checkpoint.buffers,
        x=rng.standard_normal((8, *bundle.manifest.input_shape)).astype(np.float32),
        y=rng.integers(0, 3, 8),
        weights=np.ones((steps, 4), np.float32),
        index=rng.integers(0, 8, (steps, 4)),
        lr=0.1,
        momentum=0.9,
        weight_decay=0.0,
        mu=0.0,
        anchor=checkpoint.params,
        seed=0,
    )


def test_inference_answers_batches_of_any_size() -> None:
    session = Runtime().load_inference(linear(2.0).SerializeToString())
    for count in (1, 7):
        x = np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32)
        np.testing.assert_allclose(session.run(x), 2 * x)


def test_inference_takes_windows_that_are_not_contiguous_or_not_float32() -> None:
    session = Runtime().load_inference(linear().SerializeToString())
    x = np.arange(16.0).reshape(4, 4).T
    np.testing.assert_array_equal(session.run(x), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4,), (1, 5), (0, 4), (1, 4, 1)])
def test_inference_refuses_windows_of_another_shape(shape: tuple[int, ...]) -> None:
    session = Runtime().load_inference(linear().SerializeToString())
    with pytest.raises(DataError, match="does not fit"):
        session.run(np.zeros(shape, np.float32))


@pytest.mark.parametrize("model", [b"", b"not a model", linear().SerializeToString()[:60]])
def test_bytes_that_are_no_model_are_a_model_error(model: bytes) -> None:
    with pytest.raises(ModelError, match="does not load"):
        Runtime().load_inference(model)


def test_model_with_external_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear()
    (tmp_path / "w.bin").write_bytes(np.eye(4, dtype=np.float32).tobytes())
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="does not load"):
        Runtime().load_inference(model.SerializeToString())


def test_model_that_fails_while_it_runs_is_a_model_error() -> None:
    model = linear()
    model.graph.node[0].op_type = "Reshape"
    shape = numpy_helper.from_array(np.array([3, 7], np.int64), "w")
    model.graph.initializer[0].CopyFrom(shape)
    session = Runtime().load_inference(model.SerializeToString())
    with pytest.raises(ModelError, match="while it ran"):
        session.run(np.zeros((1, 4), np.float32))


def test_sessions_are_shared_by_content_and_freed_when_nobody_holds_them() -> None:
    runtime = Runtime()
    first = runtime.load_inference(linear().SerializeToString())
    assert runtime.load_inference(linear().SerializeToString()) is first
    assert runtime.load_inference(linear(3.0).SerializeToString()) is not first
    name = id(first)
    del first
    gc.collect()
    assert not runtime._alive
    assert name


def test_runtime_keeps_the_newest_sessions_of_a_sort_until_release() -> None:
    runtime = Runtime(kept=1)
    for scale in (1.0, 2.0, 3.0):
        runtime.load_inference(linear(scale).SerializeToString())
    gc.collect()
    assert len(runtime._alive) == 1
    runtime.release()
    gc.collect()
    assert not runtime._alive


def test_answers_of_many_threads_do_not_mix() -> None:
    session = Runtime().load_inference(linear(2.0).SerializeToString())
    wrong: list[int] = []

    def work(number: int) -> None:
        x = np.full((1, 4), number, np.float32)
        kept = [session.run(x) for _ in range(200)]
        if any((answer != 2 * number).any() for answer in kept):
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_outputs_stay_what_they_are_after_later_runs(bundle: Bundle) -> None:
    session = Runtime().load_train(bundle.read(TRAIN_SGD))
    inputs = train_inputs(bundle)
    first = session.run(inputs)
    kept = first.params.copy()
    for _ in range(5):
        session.run(inputs)
    gc.collect()
    np.testing.assert_array_equal(first.params, kept)
    np.testing.assert_array_equal(inputs.params, bundle.checkpoint().params)


def test_train_graph_gives_one_loss_for_each_step(bundle: Bundle) -> None:
    outputs = Runtime().load_train(bundle.read(TRAIN_SGD)).run(train_inputs(bundle, steps=5))
    assert outputs.loss.shape == outputs.metric.shape == (5,)
    assert np.isfinite(outputs.loss).all()
    assert outputs.params.shape == (bundle.manifest.params_size,)


def test_zero_weights_leave_the_params_as_they_were(bundle: Bundle) -> None:
    inputs = train_inputs(bundle)
    idle = TrainInputs(**{**{f: getattr(inputs, f) for f in inputs.__slots__}, "weights": inputs.weights * 0})
    outputs = Runtime().load_train(bundle.read(TRAIN_SGD)).run(idle)
    np.testing.assert_array_equal(outputs.params, inputs.params)


@pytest.mark.parametrize("name", [TRAIN_SGD, TRAIN_ADAM])
def test_runtime_feeds_only_the_inputs_that_a_graph_has(bundle: Bundle, name: str) -> None:
    model = onnx.load_from_string(bundle.read(name))
    assert {node.name for node in model.graph.input} < set(TrainInputs.__slots__)
    Runtime().load_train(bundle.read(name))


def test_inference_graph_is_no_train_graph() -> None:
    with pytest.raises(ModelError, match="lacks the output"):
        Runtime().load_train(linear().SerializeToString())


def test_choose_variant_measures_both(bundle: Bundle) -> None:
    runtime = Runtime()
    float32 = runtime.load_inference(
        materialize_float32(bundle.read(FLOAT32), bundle.manifest, bundle.checkpoint())
    )
    variant, int8_seconds, float32_seconds = choose_variant(float32, float32, bundle.golden_inputs())
    assert variant in ("int8", "float32")
    assert int8_seconds > 0 < float32_seconds


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    code = "import os; os.environ.pop('ORT_DISABLE_TELEMETRY', None); import edge_agent.runtime, sys;"
    code += "print(os.environ['ORT_DISABLE_TELEMETRY'], 'torch' in sys.modules, 'onnx' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["1", "False", "False"]
