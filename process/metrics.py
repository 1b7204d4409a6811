"""Counters, gauges and histograms with Prometheus's text form; small, thread-safe, without a package.

One implementation for both sides, because a device gets no dependency for it. Laws: a metric declares its labels with
every value that they can have (what a peer sends cannot make us grow: another value is counted under `other`), so every
series is there from the start, at 0; a metric says what somebody does with it (`use`), and the reference manual prints
that; names end in their unit, counters in `_total`. Source: Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from process.clock import Clock
from process.logs import get_logger
from wire.errors import ConfigurationError, ShoalError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Buckets for what takes from a millisecond to a minute."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_INFINITY = float("inf")
_log = get_logger("metrics")

Key = tuple[str, ...]
Labels = Mapping[str, Sequence[str]]
Reading = float | Mapping[str, float] | Mapping[Key, float] | None
"""What a read function gives: a number, or one for each value (or tuple of values) of the labels; None: not known."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A histogram that somebody else keeps.

    Attributes:
        counts: observations in each bucket, not cumulative, the last one above every bound.
        total: sum of all observations.
    """

    counts: Sequence[int]
    total: float


class Metric(ABC):
    """What the three kinds share.

    Args:
        meaning: what it counts; one line.
        use: what somebody does with it; one sentence.
        labels: each label with all values that it can have.
    """

    kind = ""

    def __init__(self, name: str, meaning: str, use: str, labels: Labels) -> None:
        for word in (name, *labels):
            if not _NAME.fullmatch(word):
                raise ConfigurationError(f"{word!r} is no name for a metric or label")
        self.name = name
        self.meaning = meaning
        self.use = use
        self.labels: dict[str, Key] = {label: tuple(values) for label, values in labels.items()}
        self._allowed = tuple(frozenset(values) for values in self.labels.values())
        self._lock = threading.Lock()

    @abstractmethod
    def samples(self) -> list[tuple[str, float]]:
        """Every series as the exposition names it, and its value.

        Raises:
            ShoalError: a read function failed.
        """

    def _key(self, values: Mapping[str, str]) -> Key:
        if values.keys() != self.labels.keys():
            raise ConfigurationError(f"metric {self.name} has the labels {tuple(self.labels)}")
        return self._closed(values[label] for label in self.labels)

    def _closed(self, values: Iterable[str]) -> Key:
        pairs = zip(values, self._allowed, strict=True)
        return tuple(value if value in allowed else OTHER for value, allowed in pairs)

    def _every_key(self) -> Iterable[Key]:
        return product(*self.labels.values())

    def _series(self, key: Key, suffix: str = "", bound: str = "") -> str:
        pairs = [f'{label}="{_escape(text)}"' for label, text in zip(self.labels, key, strict=True)]
        inner = ",".join([*pairs, f'le="{bound}"'] if bound else pairs)
        return f"{self.name}{suffix}{{{inner}}}" if inner else f"{self.name}{suffix}"


class _Numbers(Metric):
    """One number a series: kept here, or read from where it is kept."""

    def __init__(self, name: str, meaning: str, use: str, labels: Labels) -> None:
        super().__init__(name, meaning, use, labels)
        self._values: dict[Key, float] = {}
        self._read: Callable[[], Reading] | None = None

    def read_from(self, read: Callable[[], Reading]) -> None:
        """Asks a function for the values whenever somebody wants to see them; from any thread."""
        self._read = read

    def value(self, **labels: str) -> float | None:
        """What stands under these labels, or None when nothing does."""
        return self._current().get(self._key(labels))

    def samples(self) -> list[tuple[str, float]]:
        return [(self._series(key), value) for key, value in sorted(self._current().items())]

    def _current(self) -> dict[Key, float]:
        if self._read is None:
            with self._lock:
                return dict(self._values)
        reading = self._read()
        if reading is None:
            return {}
        if not isinstance(reading, Mapping):
            return {(): float(reading)}
        values: dict[Key, float] = dict.fromkeys(self._every_key(), 0.0)
        for name, value in reading.items():
            key = self._closed((name,) if isinstance(name, str) else name)
            values[key] = values.get(key, 0.0) + value
        return values


class Counter(_Numbers):
    """Only goes up."""

    kind = "counter"

    def __init__(self, name: str, meaning: str, use: str, labels: Labels) -> None:
        if not name.endswith("_total"):
            raise ConfigurationError(f"counter {name!r} does not end in _total")
        super().__init__(name, meaning, use, labels)
        self._values = dict.fromkeys(self._every_key(), 0.0)

    def add(self, amount: float = 1.0, **labels: str) -> None:
        """Adds an amount ≥ 0."""
        if amount < 0:
            raise ConfigurationError(f"counter {self.name} cannot go down")
        key = self._key(labels)
        with self._lock:
            self._values[key] = self._values.get(key, 0.0) + amount


class Gauge(_Numbers):
    """Goes up and down."""

    kind = "gauge"

    def set(self, value: float, **labels: str) -> None:
        key = self._key(labels)
        with self._lock:
            self._values[key] = float(value)


class Histogram(Metric):
    """Counts observations in buckets."""

    kind = "histogram"

    def __init__(
        self, name: str, meaning: str, use: str, labels: Labels, buckets: Sequence[float] = SECONDS
    ) -> None:
        if not buckets or list(buckets) != sorted(set(buckets)):
            raise ConfigurationError(f"buckets of {name} do not rise")
        super().__init__(name, meaning, use, labels)
        self.buckets = tuple(float(bound) for bound in buckets)
        empty = len(self.buckets) + 1
        self._counts: dict[Key, list[int]] = {key: [0] * empty for key in self._every_key()}
        self._sums: dict[Key, float] = dict.fromkeys(self._counts, 0.0)
        self._read: Callable[[], Observed] | None = None

    @contextmanager
    def timed(self, clock: Clock, **labels: str) -> Iterator[None]:
        """Observes how many seconds the block takes, also when it raises."""
        started = clock.monotonic()
        try:
            yield
        finally:
            self.observe(clock.monotonic() - started, **labels)

    def observe(self, value: float, **labels: str) -> None:
        key = self._key(labels)
        with self._lock:
            counts = self._counts.setdefault(key, [0] * (len(self.buckets) + 1))
            counts[bisect_left(self.buckets, value)] += 1
            self._sums[key] = self._sums.get(key, 0.0) + value

    def read_from(self, read: Callable[[], Observed]) -> None:
        """Asks a function whenever somebody wants to see it; for a histogram without labels."""
        if self.labels:
            raise ConfigurationError(f"histogram {self.name} has labels and cannot be read from a function")
        self._read = read

    def samples(self) -> list[tuple[str, float]]:
        if self._read is not None:
            observed = self._read()
            return self._lines((), observed.counts, observed.total)
        with self._lock:
            return [
                line
                for key, counts in sorted(self._counts.items())
                for line in self._lines(key, counts, self._sums[key])
            ]

    def _lines(self, key: Key, counts: Sequence[int], total: float) -> list[tuple[str, float]]:
        lines, running = [], 0
        for bound, count in zip((*self.buckets, _INFINITY), counts, strict=True):
            running += count
            lines.append((self._series(key, "_bucket", _number(bound)), float(running)))
        return [
            *lines,
            (self._series(key, "_sum"), total),
            (self._series(key, "_count"), float(running)),
        ]


AnyMetric = TypeVar("AnyMetric", bound=Metric)


class Registry:
    """All metrics of a process."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metric] = {}
        self._unreadable: set[str] = set()

    def counter(self, name: str, meaning: str, use: str, labels: Labels | None = None) -> Counter:
        """Registers a counter; its name ends in `_total`."""
        return self._register(Counter(name, meaning, use, labels or {}))

    def gauge(self, name: str, meaning: str, use: str, labels: Labels | None = None) -> Gauge:
        """Registers a gauge."""
        return self._register(Gauge(name, meaning, use, labels or {}))

    def histogram(
        self,
        name: str,
        meaning: str,
        use: str,
        labels: Labels | None = None,
        *,
        buckets: Sequence[float] = SECONDS,
    ) -> Histogram:
        """Registers a histogram with the upper bounds of its buckets."""
        return self._register(Histogram(name, meaning, use, labels or {}, buckets))

    def metrics(self) -> list[Metric]:
        """All that is registered, by name: what the reference manual prints."""
        return [self._metrics[name] for name in sorted(self._metrics)]

    def values(self) -> dict[str, float]:
        """Every series with its value; what cannot be read now is left out."""
        return {series: value for metric in self.metrics() for series, value in self._samples(metric)}

    def render(self) -> str:
        """The exposition: one HELP, one TYPE and the samples of every metric, by name."""
        lines = []
        for metric in self.metrics():
            help_text = metric.meaning.replace("\\", r"\\").replace("\n", r"\n")
            lines += [f"# HELP {metric.name} {help_text}", f"# TYPE {metric.name} {metric.kind}"]
            lines += [f"{series} {_number(value)}" for series, value in self._samples(metric)]
        return "\n".join(lines) + "\n" if lines else ""

    def _samples(self, metric: Metric) -> list[tuple[str, float]]:
        """A book that cannot be read now must not hide the others."""
        try:
            samples = metric.samples()
        except ShoalError as error:
            if metric.name not in self._unreadable:
                _log.warning("metric_not_read", metric=metric.name, error=str(error))
            self._unreadable.add(metric.name)
            return []
        self._unreadable.discard(metric.name)
        return samples

    def _register(self, metric: AnyMetric) -> AnyMetric:
        if metric.name in self._metrics:
            raise ConfigurationError(f"metric {metric.name} is registered twice")
        self._metrics[metric.name] = metric
        return metric


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if value != value:
        return "NaN"
    if value in (_INFINITY, -_INFINITY):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
