"""Counters, gauges and histograms with Prometheus's text form; small, thread-safe, without a package.

Laws: the labels of a metric are declared with it; the number of label sets is bounded (what comes after the
bound is counted under `_other`, so a peer cannot make us grow); names end in their unit, counters in
`_total`. Source: Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TypeVar

from wire.errors import ConfigurationError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "_other"
DEFAULT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_MAX_LABEL_SETS = 200

LabelValues = tuple[str, ...]


class Metric:
    """What the three kinds share: a name, declared labels and a bounded number of label sets."""

    kind = ""

    def __init__(self, name: str, meaning: str, labels: Sequence[str], max_label_sets: int) -> None:
        for word in (name, *labels):
            if not _NAME.fullmatch(word):
                raise ConfigurationError(f"{word!r} is no name for a metric or label")
        self.name = name
        self.meaning = meaning
        self.labels = tuple(labels)
        self._max_label_sets = max_label_sets
        self._lock = threading.Lock()
        self._seen: set[LabelValues] = set()

    def _key(self, values: dict[str, str]) -> LabelValues:
        """Under the lock: the label set that these values are counted under."""
        if set(values) != set(self.labels):
            raise ConfigurationError(f"metric {self.name} has the labels {self.labels}, not {tuple(values)}")
        key = tuple(str(values[label]) for label in self.labels)
        if key not in self._seen:
            if len(self._seen) >= self._max_label_sets:
                return tuple(OTHER for _ in self.labels)
            self._seen.add(key)
        return key

    def samples(self) -> list[str]:
        """Lines of the exposition, without HELP and TYPE."""
        raise NotImplementedError

    def _line(self, suffix: str, key: LabelValues, value: float, extra: str = "") -> str:
        pairs = [f'{label}="{_escape(text)}"' for label, text in zip(self.labels, key, strict=True)]
        inner = ",".join([*pairs, extra] if extra else pairs)
        return (
            f"{self.name}{suffix}{{{inner}}} {_number(value)}"
            if inner
            else f"{self.name}{suffix} {_number(value)}"
        )


class Counter(Metric):
    """Only goes up."""

    kind = "counter"

    def __init__(self, name: str, meaning: str, labels: Sequence[str], max_label_sets: int) -> None:
        if not name.endswith("_total"):
            raise ConfigurationError(f"counter {name!r} does not end in _total")
        super().__init__(name, meaning, labels, max_label_sets)
        self._values: dict[LabelValues, float] = {} if labels else {(): 0.0}

    def add(self, amount: float = 1.0, **labels: str) -> None:
        """Adds an amount ≥ 0."""
        if amount < 0:
            raise ConfigurationError(f"counter {self.name} cannot go down")
        with self._lock:
            key = self._key(labels)
            self._values[key] = self._values.get(key, 0.0) + amount

    def value(self, **labels: str) -> float:
        """What was counted under these labels; 0 when nothing was."""
        with self._lock:
            return self._values.get(tuple(labels[label] for label in self.labels), 0.0)

    def samples(self) -> list[str]:
        with self._lock:
            return [self._line("", key, value) for key, value in sorted(self._values.items())]


class Gauge(Metric):
    """Goes up and down, or is read from a function when somebody asks."""

    kind = "gauge"

    def __init__(self, name: str, meaning: str, labels: Sequence[str], max_label_sets: int) -> None:
        super().__init__(name, meaning, labels, max_label_sets)
        self._values: dict[LabelValues, float] = {}
        self._function: Callable[[], float] | None = None

    def set(self, value: float, **labels: str) -> None:
        with self._lock:
            self._values[self._key(labels)] = float(value)

    def add(self, amount: float, **labels: str) -> None:
        """Moves the gauge by an amount of any sign."""
        with self._lock:
            key = self._key(labels)
            self._values[key] = self._values.get(key, 0.0) + amount

    def set_function(self, function: Callable[[], float]) -> None:
        """Reads the value from a function at every exposition; for a gauge without labels."""
        if self.labels:
            raise ConfigurationError(f"gauge {self.name} has labels and cannot be read from a function")
        self._function = function

    def value(self, **labels: str) -> float | None:
        """The value under these labels, or None when it was never set."""
        with self._lock:
            return self._values.get(tuple(labels[label] for label in self.labels))

    def samples(self) -> list[str]:
        if self._function is not None:
            return [self._line("", (), float(self._function()))]
        with self._lock:
            return [self._line("", key, value) for key, value in sorted(self._values.items())]


class Histogram(Metric):
    """Counts observations in cumulative buckets."""

    kind = "histogram"

    def __init__(
        self, name: str, meaning: str, labels: Sequence[str], max_label_sets: int, buckets: Sequence[float]
    ) -> None:
        if not buckets or list(buckets) != sorted(set(buckets)):
            raise ConfigurationError(f"buckets of {name} do not rise")
        super().__init__(name, meaning, labels, max_label_sets)
        self._bounds = tuple(float(bound) for bound in buckets)
        self._counts: dict[LabelValues, list[int]] = {}
        self._sums: dict[LabelValues, float] = {}

    def observe(self, value: float, **labels: str) -> None:
        with self._lock:
            key = self._key(labels)
            counts = self._counts.setdefault(key, [0] * (len(self._bounds) + 1))
            counts[bisect_left(self._bounds, value)] += 1
            self._sums[key] = self._sums.get(key, 0.0) + value

    def samples(self) -> list[str]:
        lines = []
        with self._lock:
            for key, counts in sorted(self._counts.items()):
                running = 0
                for bound, count in zip((*self._bounds, float("inf")), counts, strict=True):
                    running += count
                    lines.append(self._line("_bucket", key, running, f'le="{_number(bound)}"'))
                lines.append(self._line("_sum", key, self._sums[key]))
                lines.append(self._line("_count", key, running))
        return lines


AnyMetric = TypeVar("AnyMetric", bound=Metric)


class Registry:
    """All metrics of a process, or of a part of it.

    Args:
        max_label_sets: of one metric; further ones are counted under `_other`.
    """

    def __init__(self, max_label_sets: int = _MAX_LABEL_SETS) -> None:
        self._max_label_sets = max_label_sets
        self._metrics: dict[str, Metric] = {}
        self._lock = threading.Lock()

    def counter(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Counter:
        """Registers a counter; its name ends in `_total`."""
        return self._register(Counter(name, meaning, labels, self._max_label_sets))

    def gauge(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Gauge:
        """Registers a gauge."""
        return self._register(Gauge(name, meaning, labels, self._max_label_sets))

    def histogram(
        self, name: str, meaning: str, labels: Sequence[str] = (), buckets: Sequence[float] = DEFAULT_BUCKETS
    ) -> Histogram:
        """Registers a histogram with the upper bounds of its buckets."""
        return self._register(Histogram(name, meaning, labels, self._max_label_sets, buckets))

    def metrics(self) -> list[Metric]:
        """All that is registered, by name: what the reference manual prints."""
        with self._lock:
            return [self._metrics[name] for name in sorted(self._metrics)]

    def render(self) -> str:
        """The exposition: one HELP, one TYPE and the samples of every metric, by name."""
        lines = []
        for metric in self.metrics():
            help_text = metric.meaning.replace("\\", r"\\").replace("\n", r"\n")
            lines += [
                f"# HELP {metric.name} {help_text}",
                f"# TYPE {metric.name} {metric.kind}",
                *metric.samples(),
            ]
        return "\n".join(lines) + "\n" if lines else ""

    def _register(self, metric: AnyMetric) -> AnyMetric:
        with self._lock:
            if metric.name in self._metrics:
                raise ConfigurationError(f"metric {metric.name} is registered twice")
            self._metrics[metric.name] = metric
        return metric


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))
