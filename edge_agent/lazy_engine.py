"""ONNX Runtime on first use: an agent without a model must not pay 20 MiB for it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from edge_agent.background import Background
from edge_agent.ports import InferenceSession, TrainSession

if TYPE_CHECKING:
    from edge_agent.runtime import Runtime


class LazyEngine:
    """The engine of a real device, safe from several threads; imports `runtime.py` with the first model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runtime: Runtime | None = None

    def load_inference(self, model: bytes) -> InferenceSession:
        return self._loaded().load_inference(model)

    def load_train(self, model: bytes) -> TrainSession:
        return self._loaded().load_train(model)

    def release(self) -> None:
        """Lets go of what was kept for the next job."""
        with self._lock:
            if self._runtime is not None:
                self._runtime.release()

    def _loaded(self) -> Runtime:
        with self._lock:
            if self._runtime is None:
                from edge_agent.runtime import Runtime

                self._runtime = Runtime(kept=1, background=Background().run)
            return self._runtime
