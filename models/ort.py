"""The only door to onnxruntime on the models' side: sessions over bytes, quiet and single-threaded.

Laws of the file: the environment that keeps onnxruntime from phoning home is set before it is imported; a
session never uses more than the caller's thread (a spinning pool burns 29 times the CPU of the work itself)
and never reads a path, so external data can never be pulled in.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from wire.errors import ModelError

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

Session: TypeAlias = onnxruntime.InferenceSession
Feeds = Mapping[str, npt.NDArray[Any]]

_ONNXRUNTIME_ERRORS: tuple[type[Exception], ...] = (
    onnxruntime.capi.onnxruntime_pybind11_state.Fail,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented,
    onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException,
)
ERROR_LEVEL = 3


def make_session(model: bytes) -> Session:
    """Load an ONNX model for one CPU thread.

    Args:
        model: the serialized ONNX model, without external data.

    Raises:
        ModelError: onnxruntime cannot load the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = ERROR_LEVEL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except _ONNXRUNTIME_ERRORS as error:
        raise ModelError(f"onnxruntime cannot load the model: {error}", size_bytes=len(model)) from error


def input_names(session: Session) -> tuple[str, ...]:
    """Names of the inputs that the graph asks for, in its order."""
    return tuple(value.name for value in session.get_inputs())


def run(session: Session, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
    """Run once; feeds that the graph does not ask for are left out.

    Returns:
        The outputs by name.

    Raises:
        ModelError: an input is missing, has a wrong shape or type, or a node failed.
    """
    wanted = input_names(session)
    missing = [name for name in wanted if name not in feeds]
    if missing:
        raise ModelError(f"inputs missing: {', '.join(missing)}", missing=missing)
    names = [value.name for value in session.get_outputs()]
    try:
        values = session.run(names, {name: np.asarray(feeds[name]) for name in wanted})
    except _ONNXRUNTIME_ERRORS as error:
        raise ModelError(f"onnxruntime cannot run the model: {error}") from error
    return dict(zip(names, values, strict=True))


def load_quantizer() -> ModuleType:
    """`onnxruntime.quantization`, imported only where a model is quantized: it brings onnx along."""
    return importlib.import_module("onnxruntime.quantization")
