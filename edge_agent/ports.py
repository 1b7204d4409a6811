"""The seams of the agent: what it needs from the outside, as protocols, and the values that cross them.

Laws of the file: types only, no I/O, and nothing heavy is imported (an agent that serves no model yet must
not pay for ONNX Runtime). The real adapters stand in `runtime.py`, `selftest.py`, `worker.py` and in
`wire.transport`; the simulator brings others behind the same seams. Source: docs/architecture.md, "The
agent", "Train step graph".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edge_agent.release.files import SlotContents

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Variant = Literal["int8", "float32"]


@dataclass(frozen=True, slots=True)
class Moment:
    """One instant on both clocks, in seconds. Timers run on `elapsed`, deadlines of messages on `wall`."""

    wall: float
    elapsed: float


@dataclass(frozen=True, slots=True)
class TrainInputs:
    """Inputs of a train step graph; the fields are named as the graph's inputs.

    Attributes:
        params: float32 [P].
        opt_state: float32 [S].
        buffers: float32 [Q].
        x: float32 [N, …], every sample that `index` points to.
        y: int64 [N].
        weights: float32 [K, B]; 0 pads a short batch.
        index: int64 [K, B], rows of `x` and `y`.
        anchor: float32 [P], the point that FedProx (`mu`) pulls to.
        noise: float32 [K, P], standard normal; None for a session that does not take any.
    """

    params: Floats
    opt_state: Floats
    buffers: Floats
    x: Floats
    y: Integers
    weights: Floats
    index: Integers
    lr: float
    momentum: float
    weight_decay: float
    mu: float
    anchor: Floats
    seed: int
    noise: Floats | None = None


@dataclass(frozen=True, slots=True)
class TrainOutputs:
    """Outputs of a train step graph after K steps: new state, and loss and metric float32 [K]."""

    params: Floats
    opt_state: Floats
    buffers: Floats
    loss: Floats
    metric: Floats


class InferenceSession(Protocol):
    """A loaded inference graph. Safe to call from many threads at once."""

    def run(self, x: Floats) -> Floats:
        """Answers float32 [N, …] for windows float32 [N, …].

        Raises:
            DataError: the windows do not have the shape that the graph takes.
            ModelError: the graph failed while it ran.
        """
        ...


class TrainSession(Protocol):
    """A loaded train step graph."""

    @property
    def takes_noise(self) -> bool:
        """Whether its steps are DP-SGD's, which need `TrainInputs.noise`."""
        ...

    def run(self, inputs: TrainInputs) -> TrainOutputs:
        """Does K optimizer steps.

        Raises:
            ModelError: the graph failed while it ran, does not have the outputs of the contract, or lacks its noise.
        """
        ...


class Engine(Protocol):
    """Loads graphs. Sessions are shared by content hash behind this seam."""

    def load_inference(self, model: bytes) -> InferenceSession:
        """Raises `ModelError` when the bytes are not a graph that can run."""
        ...

    def load_train(self, model: bytes) -> TrainSession:
        """Raises `ModelError` when the bytes are not a graph that can run."""
        ...


@dataclass(frozen=True, slots=True)
class SelfTestVerdict:
    """What a passed self-test found: seconds per window of each variant on this machine, and the faster."""

    variant: Variant
    int8_seconds: float
    float32_seconds: float


class SelfTest(Protocol):
    """Proves a staged model before it may serve."""

    def check(self, contents: SlotContents) -> SelfTestVerdict:
        """Loads and runs both variants of a staged release where a crash cannot hurt the agent.

        Raises:
            SelfTestError: it does not load, crashes, takes too long or too much memory, or answers wrongly.
        """
        ...


JobKind = Literal["train", "evaluate", "update"]


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended: `value` when `error` is empty.

    Attributes:
        kind: what was asked for.
        key: the caller's name of the job (an order id, or empty).
        value: what the job's function returned.
        error: why it failed, one line, or empty.
        asked_seconds: how long whoever refused it wants to be left alone.
    """

    kind: JobKind
    key: bytes
    value: Any = None
    error: str = ""
    asked_seconds: float = 0.0


class Worker(Protocol):
    """Runs one job at a time away from the event loop."""

    def submit(
        self, kind: JobKind, key: bytes, work: Callable[[], Any], done: Callable[[JobResult], None]
    ) -> None:
        """Starts `work`; `done` is called exactly once, from any thread, and may only enqueue."""
        ...

    def stop(self) -> None:
        """Waits for a running job for a moment and frees the thread. Safe to call twice."""
        ...
