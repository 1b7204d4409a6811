"""Answers: the model that serves now, the swap to the next one, and the books about both.

Laws of the file: a swap is one assignment of a reference, so a request in flight ends on the model it
began with and none is lost; a model that fails on a request while its predecessor is at hand costs no
answer; wrong input is the caller's error and is not held against the model. Source:
docs/architecture.md, laws 2 and 5.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from edge_agent.ports import Floats, InferenceSession, Variant
from edge_agent.release.watch import Watch
from process.clock import Clock
from wire.errors import DataError, ModelError
from wire.manifest import TaskSpec

LATENCIES_KEPT = 1024
SWAPS_KEPT = 64


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that is ready to answer."""

    session: InferenceSession
    task: TaskSpec
    input_shape: tuple[int, ...]
    release_version: int
    graphs_sha256: bytes
    release_sha256: bytes
    variant: Variant


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says about one window.

    Attributes:
        label: the class; None for an anomaly task.
        name: the class's name, or empty.
        scores: float32 [classes] probabilities; for an anomaly task float32 [1], the reconstruction error.
        sample_id: names the window for `Agent.feedback`.
    """

    label: int | None
    name: str
    scores: Floats
    release_version: int
    sample_id: str


@dataclass(slots=True)
class Counts:
    """Requests that a release answered or failed to answer."""

    requests: int = 0
    errors: int = 0


@dataclass(slots=True)
class Swap:
    """One change of the served model: how many requests ran at that moment, and what came until the next."""

    from_version: int
    to_version: int
    in_flight: int
    counts: Counts = field(default_factory=Counts)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the served model did since the last report."""

    requests: int
    errors: int
    latency_p50_seconds: float
    latency_p99_seconds: float
    confidence_mean: float
    label_counts: tuple[int, ...]


class Serving:
    """Serves one model at a time to any number of threads.

    Args:
        clock: measures latencies. served_badly: called (once for a release) with its version and the
        reason when it failed on a request; from
            the requesting thread, so it may only enqueue.

    Attributes:
        note_in_flight: told how many answers are being worked out, whenever that changes (`flight.py`).
    """

    def __init__(self, clock: Clock, served_badly: Callable[[int, str], None]) -> None:
        self._clock = clock
        self._served_badly = served_badly
        self._lock = threading.Lock()
        self._models: tuple[ServedModel | None, ServedModel | None] = (None, None)
        self._reported: set[int] = set()
        self._in_flight = 0
        self._since_report = Counts()
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._confidence_sum = 0.0
        self._label_counts: dict[int, int] = {}
        self.note_in_flight: Callable[[int], None] = lambda count: None
        self.total = Counts()
        self.bad_input_total = 0
        self.by_release: dict[int, Counts] = {}
        self.swaps: deque[Swap] = deque(maxlen=SWAPS_KEPT)
        self.watch: Watch | None = None
        self.has_model = threading.Event()

    @property
    def current(self) -> ServedModel | None:
        """The model that answers now."""
        return self._models[0]

    @property
    def fallback(self) -> ServedModel | None:
        """The model that answers when the current one fails; None when the current one is trusted."""
        return self._models[1]

    def swap(self, model: ServedModel | None, fallback: ServedModel | None) -> None:
        """Serves `model` from the next request on; `fallback` stands by."""
        before = self._models[0]
        watch = self._watch_over(model, fallback)
        with self._lock:
            self._models, self.watch = (model, fallback), watch
            old, new = (m.release_version if m else 0 for m in (before, model))
            if old != new:
                self.swaps.append(Swap(old, new, self._in_flight))
                self._label_counts.clear()
        if model is not None:
            self.has_model.set()

    def trust(self) -> None:
        """Lets the fallback go: the current model has proven itself."""
        with self._lock:
            self._models, self.watch = (self._models[0], None), None

    def infer(self, x: Floats, sample_id: str) -> Answer:
        """Answers one window.

        Args:
            x: float32 [*input_shape], or [1, *input_shape].

        Raises:
            DataError: the window does not fit the model or is not finite.
            ModelError: there is no model yet, or no model could answer.
        """
        model, fallback = self._models
        if model is None:
            raise ModelError(
                "there is no model on this device yet",
                hint="it comes with the first release: `shoal-edge check`",
            )
        batch = self._as_batch(x, model)
        with self._lock:
            self._in_flight += 1
            self.note_in_flight(self._in_flight)
        started = self._clock.monotonic()
        try:
            answer = self._answer(model, fallback, batch, sample_id)
        finally:
            with self._lock:
                self._in_flight -= 1
                self.note_in_flight(self._in_flight)
        self._count(answer, self._clock.monotonic() - started)
        watch = self.watch
        if watch is not None and answer.release_version == watch.version:
            watch.offer(batch)
        return answer

    def statistics(self) -> Statistics:
        """What happened since the last call; starts a new interval."""
        with self._lock:
            counts, self._since_report = self._since_report, Counts()
            latencies = np.array(self._latencies) if self._latencies else np.zeros(1)
            self._latencies.clear()
            confidence, self._confidence_sum = self._confidence_sum, 0.0
            model = self._models[0]
            classes = model.task.classes if model is not None else 0
            labels = tuple(self._label_counts.get(label, 0) for label in range(min(classes, 4096)))
            self._label_counts.clear()
        answered = max(1, counts.requests - counts.errors)
        return Statistics(
            requests=counts.requests,
            errors=counts.errors,
            latency_p50_seconds=max(0.0, float(np.quantile(latencies, 0.5))),
            latency_p99_seconds=max(0.0, float(np.quantile(latencies, 0.99))),
            confidence_mean=confidence / answered,
            label_counts=labels,
        )

    def _watch_over(self, model: ServedModel | None, fallback: ServedModel | None) -> Watch | None:
        """A watch over a model whose predecessor stands by and answers the same kind of question."""
        if model is None or fallback is None or model.input_shape != fallback.input_shape:
            return None
        if (model.task.kind, model.task.classes) != (fallback.task.kind, fallback.task.classes):
            return None

        def asked(one: ServedModel) -> Callable[[Floats], tuple[int | None, float]]:
            def ask(batch: Floats) -> tuple[int | None, float]:
                answer = _say(one, batch, "")
                return answer.label, float(answer.scores.max())

            return ask

        return Watch(model.release_version, asked(model), asked(fallback), self._clock)

    def _as_batch(self, x: Floats, model: ServedModel) -> Floats:
        batch = np.asarray(x, dtype=np.float32)
        if batch.shape == model.input_shape:
            batch = batch[None]
        if batch.shape != (1, *model.input_shape) or not np.isfinite(batch).all():
            with self._lock:
                self.bad_input_total += 1
            wanted = list(model.input_shape)
            if batch.shape != (1, *model.input_shape):
                raise DataError(f"a window has the shape {list(np.shape(x))}, the model takes {wanted}")
            raise DataError(
                "a window holds values that are not finite", hint="leave out or fill missing readings"
            )
        return batch

    def _answer(
        self, model: ServedModel, fallback: ServedModel | None, batch: Floats, sample_id: str
    ) -> Answer:
        try:
            return _say(model, batch, sample_id)
        except ModelError as error:
            self._blame(model, str(error))
            if fallback is None or fallback.input_shape != model.input_shape:
                raise
            return _say(fallback, batch, sample_id)

    def _blame(self, model: ServedModel, reason: str) -> None:
        with self._lock:
            first = model.release_version not in self._reported
            self._reported.add(model.release_version)
            for counts in self._books(model.release_version):
                counts.requests += 1
                counts.errors += 1
        if first:
            self._served_badly(model.release_version, reason)

    def _count(self, answer: Answer, seconds: float) -> None:
        with self._lock:
            for counts in self._books(answer.release_version):
                counts.requests += 1
            self._latencies.append(seconds)
            self._confidence_sum += float(answer.scores.max())
            if answer.label is not None:
                self._label_counts[answer.label] = self._label_counts.get(answer.label, 0) + 1

    def _books(self, version: int) -> tuple[Counts, ...]:
        """Every account that a request goes into. A request that its fallback answers stands in them
        twice: once as an error of the one model, once as an answer of the other."""
        books = [self.total, self._since_report, self.by_release.setdefault(version, Counts())]
        if self.swaps:
            books.append(self.swaps[-1].counts)
        return tuple(books)


def _say(model: ServedModel, batch: Floats, sample_id: str) -> Answer:
    scores = model.session.run(batch)
    if not np.isfinite(scores).all():
        raise ModelError("the model's answer is not finite", release_version=model.release_version)
    if model.task.kind == "anomaly":
        error = np.mean((scores - batch) ** 2, dtype=np.float64)
        return Answer(None, "", np.array([error], np.float32), model.release_version, sample_id)
    if scores.shape != (1, model.task.classes):
        raise ModelError(f"the model answers {list(scores.shape)} instead of {model.task.classes} scores")
    exponent = np.exp(scores[0] - scores[0].max())
    probabilities = (exponent / exponent.sum()).astype(np.float32)
    label = int(probabilities.argmax())
    name = model.task.labels[label] if model.task.labels else ""
    return Answer(label, name, probabilities, model.release_version, sample_id)
