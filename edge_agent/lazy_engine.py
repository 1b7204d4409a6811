"""ONNX Runtime on first use: an agent without a model must not pay 20 MiB for it."""

from __future__ import annotations

import threading

from edge_agent.ports import Engine, InferenceSession, TrainSession


class LazyEngine:
    """The engine of a real device, safe from several threads; imports `runtime.py` with the first model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runtime: Engine | None = None

    def load_inference(self, model: bytes) -> InferenceSession:
        return self._loaded().load_inference(model)

    def load_train(self, model: bytes) -> TrainSession:
        return self._loaded().load_train(model)

    def _loaded(self) -> Engine:
        with self._lock:
            if self._runtime is None:
                from edge_agent.runtime import Runtime

                self._runtime = Runtime()
            return self._runtime
