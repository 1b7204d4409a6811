"""From the aggregator's books to the rows of a report: what was folded, released and held back, and how good it was.

Laws of the file: reads only; a release is judged by its int8 file, as devices serve it; the reported windows are read
here, after the run, and nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cloud_server.db.engine import Connection
from cloud_server.db.releases import RELEASED, ReleaseRow, load_releases
from cloud_server.db.rounds import RoundRow, UpdateRow, load_rounds, load_updates
from fleet import report
from models.bundle import Bundle
from models.data.federation import Federation, Floats, Labels, Split
from models.evaluate import anomaly_scores, answers_of, area_under_curve, evaluate
from wire.checkpoint import Checkpoint
from wire.manifest import FLOAT32, TEMPLATE, TaskSpec
from wire.materialize import materialize_float32, materialize_int8

Variant = Literal["int8", "float32"]


@dataclass(frozen=True, slots=True)
class Books:
    """A run as the database has it: rounds, releases that went out by version, folded updates by device."""

    rounds: Sequence[RoundRow]
    released: Sequence[ReleaseRow]
    updates: Mapping[str, Sequence[UpdateRow]]


def read_books(connection: Connection, run: str) -> Books:
    """Reads a run."""
    rounds = load_rounds(connection, run)
    updates: dict[str, list[UpdateRow]] = defaultdict(list)
    for row in rounds:
        for update in load_updates(connection, run, row.number, "train", "folded"):
            updates[update.device].append(update)
    released = sorted(
        (row for row in load_releases(connection) if row.state == RELEASED), key=lambda row: row.version
    )
    return Books(rounds, released, updates)


class Judge:
    """Measures releases by the task's metric (accuracy, or an anomaly task's mean squared error).

    Args:
        checkpoint: gives the parameters of a release by its version.
    """

    def __init__(self, bundle: Bundle, checkpoint: Callable[[int], Checkpoint]) -> None:
        self._bundle = bundle
        self._checkpoint = checkpoint
        self._files: dict[tuple[int, Variant], bytes] = {}

    @property
    def task(self) -> TaskSpec:
        """What the model is for."""
        return self._bundle.manifest.task

    @property
    def params_size(self) -> int:
        """P of the model."""
        return self._bundle.manifest.params_size

    def score(self, version: int, x: Floats, y: Labels, variant: Variant = "int8") -> float:
        """The metric of a release's file; 0 where there is nothing to answer."""
        return evaluate(self._file(version, variant), self.task, x, y).metric if len(x) else 0.0

    def share_answered(self, version: int, x: Floats, label: int) -> float:
        """How many of the windows a release's int8 file answers with this label; 0 without windows."""
        if not len(x):
            return 0.0
        return float(np.mean(answers_of(self._file(version, "int8"), x).argmax(1) == label))

    def separation(self, version: int, x: Floats, unseen: Mapping[str, Floats]) -> dict[str, float]:
        """How well a release's int8 file tells samples of each unseen kind from the usual `x` (AUC)."""
        if not unseen:
            return {}
        usual = anomaly_scores(self._file(version, "int8"), x)
        return {
            name: area_under_curve(usual, anomaly_scores(self._file(version, "int8"), unusual))
            for name, unusual in unseen.items()
        }

    def _file(self, version: int, variant: Variant) -> bytes:
        key = (version, variant)
        if key not in self._files:
            bundle, checkpoint = self._bundle, self._checkpoint(version)
            if variant == "int8":
                made = materialize_int8(bundle.read(TEMPLATE), bundle.manifest, checkpoint)
            else:
                made = materialize_float32(bundle.read(FLOAT32), bundle.manifest, checkpoint)
            self._files[key] = made
        return self._files[key]


def device_row(
    device: str,
    split: Split,
    books: Books,
    judge: Judge,
    *,
    traffic: tuple[int, int],
    counts: tuple[int, int],
) -> report.DeviceRow:
    """A device's row.

    Args:
        traffic: bytes sent and received.
        counts: inference requests, and those that failed.
    """
    updates = books.updates.get(device, ())
    first, last = books.released[0].version, books.released[-1].version
    return report.DeviceRow(
        device=device,
        group=device.rsplit("-", 1)[0],
        test_windows=len(split.test_x),
        first=judge.score(first, split.test_x, split.test_y),
        last=judge.score(last, split.test_x, split.test_y),
        updates=len(updates),
        update_bytes=sum(update.size_bytes for update in updates),
        float32_bytes=len(updates) * 4 * judge.params_size,
        sent_bytes=traffic[0],
        received_bytes=traffic[1],
        requests=counts[0],
        errors=counts[1],
    )


def round_rows(books: Books, metric: str) -> tuple[report.RoundRow, ...]:
    """One row a round, with what the gate said; `metric` is the task's."""
    versions = {row.round: row.version for row in books.released if row.run}
    return tuple(_round_row(row, versions.get(row.number, 0), metric) for row in books.rounds)


def release_rows(books: Books, judge: Judge, federation: Federation) -> tuple[report.ReleaseRow, ...]:
    """One row a release, measured on the later windows of all devices."""
    x = np.concatenate([split.test_x for split in federation.devices.values()])
    y = np.concatenate([split.test_y for split in federation.devices.values()])
    return tuple(
        report.ReleaseRow(
            row.version,
            row.round,
            judge.score(row.version, x, y),
            judge.score(row.version, x, y, "float32"),
            judge.separation(row.version, x, federation.unseen),
        )
        for row in books.released
    )


def _round_row(row: RoundRow, version: int, metric: str) -> report.RoundRow:
    decision = row.reason
    if row.state == "done":
        decision = f"released {version}" if version else f"held: {row.reason}" if row.reason else ""
    return report.RoundRow(
        number=row.number,
        state=row.state,
        replies=int(row.metrics.get("train_devices", 0)),
        validation=row.metrics.get(metric),
        decision=decision,
        seconds=row.ended - row.started if row.ended else None,
    )
