"""The device's one door to ONNX Runtime: load a graph, run it, share it.

Laws of the file: telemetry is off before the import; one thread and no spinning by default; no `OrtValue`
over numpy memory that we do not own (inputs live for the call, outputs are fresh arrays); external data in a
model is refused; every failure of the library becomes a `ModelError`. Source: docs/architecture.md, "Train
step graph".
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import hashlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from edge_agent.freed_memory import LARGE_BYTES, keep_large_buffers
from edge_agent.ports import Floats, InferenceSession, TrainInputs, TrainOutputs, TrainSession, Variant
from wire.errors import DataError, ModelError

# The binding has no common base class for its exceptions.
_NATIVE_ERRORS: tuple[type[Exception], ...] = (
    native.EPFail,
    native.EngineError,
    native.Fail,
    native.InvalidArgument,
    native.InvalidGraph,
    native.InvalidProtobuf,
    native.NoModel,
    native.NoSuchFile,
    native.NotImplemented,
    native.RuntimeException,
    RuntimeError,
    ValueError,
)
# Cannot exist, so a model that names a file outside of itself does not load.
_NO_EXTERNAL_DATA = "/dev/null/none"
_WARM_UP_RUNS = 3
_MEASURED_RUNS = 15

S = TypeVar("S", "OrtInference", "OrtTraining")
Background = Callable[[Callable[[], Any]], Any]
"""Runs a call and gives what it gives, wherever that is done."""


def _open(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # An arena keeps the peak of every shape that it has seen, for weeks where a model serves; where one trains it
    # is made and freed with every job, and a large model's fresh pages cost more than reuse saves (1 to 2 %).
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", _NO_EXTERNAL_DATA
    )
    try:
        # Its "fallback" loads a broken model a second time and prints about it to standard output, which is data.
        return onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], enable_fallback=False
        )
    except _NATIVE_ERRORS as error:
        raise ModelError(f"the model does not load: {_first_line(error)}", size_bytes=len(model)) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


class OrtInference:
    """A loaded inference graph with one input and one output that counts."""

    def __init__(self, model: bytes) -> None:
        self._session = _open(model)
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            raise ModelError(
                "an inference graph takes one float32 input", inputs=[node.name for node in inputs]
            )
        if not self._session.get_outputs():
            raise ModelError("an inference graph gives an answer, and this one has no output")
        self._name: str = inputs[0].name
        self._window: tuple[Any, ...] = tuple(inputs[0].shape[1:])
        self._outputs: list[str] = [self._session.get_outputs()[0].name]

    def run(self, x: Floats) -> Floats:
        windows = np.ascontiguousarray(x, dtype=np.float32)
        if not self._fits(windows.shape):
            raise DataError(
                f"a window of shape {list(windows.shape[1:])} does not fit a model of {list(self._window)}",
                hint="send one window, or a batch of windows, in the shape that `shoal-edge status` shows",
            )
        try:
            answer = self._session.run(self._outputs, {self._name: windows})[0]
        except _NATIVE_ERRORS as error:
            raise ModelError(f"the model failed while it ran: {_first_line(error)}") from error
        return np.asarray(answer, dtype=np.float32)

    def _fits(self, shape: tuple[int, ...]) -> bool:
        """Dimensions that the graph leaves free are strings or None and fit anything."""
        if len(shape) != len(self._window) + 1 or shape[0] < 1:
            return False
        return all(
            not isinstance(wanted, int) or wanted == given
            for wanted, given in zip(self._window, shape[1:], strict=True)
        )


class OrtTraining:
    """A loaded train step graph; feeds only the inputs that the graph has."""

    def __init__(self, model: bytes, background: Background = lambda call: call()) -> None:
        self._background = background
        self._session = _open(model)
        self._inputs = {node.name: node.type for node in self._session.get_inputs()}
        self._outputs = {node.name for node in self._session.get_outputs()}
        missing = {"params_out", "loss"} - self._outputs
        if missing:
            raise ModelError(f"the train step graph lacks the output {sorted(missing)[0]}")
        unknown = self._inputs.keys() - TrainInputs.__dataclass_fields__.keys()
        if unknown:
            raise ModelError(f"the train step graph asks for the unknown input {sorted(unknown)[0]}")

    @property
    def takes_noise(self) -> bool:
        return "noise" in self._inputs

    def run(self, inputs: TrainInputs) -> TrainOutputs:
        if self.takes_noise and inputs.noise is None:
            raise ModelError("the train step graph asks for noise, and there is none")
        if inputs.params.nbytes >= LARGE_BYTES:
            keep_large_buffers()
        feed = {name: _as_fed(getattr(inputs, name), kind) for name, kind in self._inputs.items()}
        wanted = sorted(self._outputs)
        try:
            answers = self._background(lambda: self._session.run(wanted, feed))
            got = dict(zip(wanted, answers, strict=True))
        except _NATIVE_ERRORS as error:
            raise ModelError(f"the train step failed while it ran: {_first_line(error)}") from error
        steps = inputs.index.shape[0]
        return TrainOutputs(
            params=got["params_out"],
            opt_state=got.get("opt_state_out", inputs.opt_state),
            buffers=got.get("buffers_out", inputs.buffers),
            loss=np.reshape(got["loss"], steps),
            metric=np.reshape(got["metric"], steps) if "metric" in got else np.zeros(steps, np.float32),
        )


def _as_fed(value: Any, kind: str) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(value, dtype=np.int64 if kind == "tensor(int64)" else np.float32).reshape(
        np.shape(value)
    )


class Runtime:
    """Loads graphs, each content once: agents that share a `Runtime` share its sessions.

    Args:
        kept: sessions of each sort that stay loaded when nobody holds them, until `release`: jobs that follow
            each other need the same train step, and in a simulator every device does.
        background: where train steps run.
    """

    def __init__(self, *, kept: int = 0, background: Background = lambda call: call()) -> None:
        self._kept = kept
        self._background = background
        self._lock = threading.Lock()
        self._alive: weakref.WeakValueDictionary[tuple[str, bytes], Any] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[tuple[str, bytes], Any] = OrderedDict()

    def load_inference(self, model: bytes) -> InferenceSession:
        return self._shared("inference", model, OrtInference)

    def load_train(self, model: bytes) -> TrainSession:
        return self._shared("train", model, lambda data: OrtTraining(data, self._background))

    def release(self) -> None:
        """Lets go of the sessions that nobody holds."""
        with self._lock:
            self._recent.clear()

    def _shared(self, sort: str, model: bytes, load: Callable[[bytes], S]) -> S:
        key = (sort, hashlib.sha256(model).digest())
        with self._lock:
            session = self._alive.get(key)
            if session is None:
                session = load(model)
                self._alive[key] = session
            if self._kept:
                self._recent[key] = session
                self._recent.move_to_end(key)
                of_sort = [each for each in self._recent if each[0] == sort]
                if len(of_sort) > self._kept:
                    del self._recent[of_sort[0]]
        return session


def choose_variant(
    int8: InferenceSession, float32: InferenceSession, x: Floats
) -> tuple[Variant, float, float]:
    """Measures both variants on one window and names the faster.

    Args:
        x: float32 [N, …]; its first window is what is measured.

    Returns:
        The faster variant, then median seconds per window of int8 and of float32. A tie goes to int8.
    """
    window = x[:1]
    sessions = (int8, float32)
    for session in sessions:
        for _ in range(_WARM_UP_RUNS):
            session.run(window)
    seconds: tuple[list[float], list[float]] = ([], [])
    # Interleaved, so that a neighbour's load falls on both.
    for _ in range(_MEASURED_RUNS):
        for session, taken in zip(sessions, seconds, strict=True):
            started = time.perf_counter()
            session.run(window)
            taken.append(time.perf_counter() - started)
    int8_seconds, float32_seconds = (float(np.median(taken)) for taken in seconds)
    return ("int8" if int8_seconds <= float32_seconds else "float32", int8_seconds, float32_seconds)
