"""What a fleet's run came to, as one value: the rows behind the table, the JSON and the page.

Laws of the file: values only, nothing is measured here; `summary` of a simulation holds no times, so that the same seed
gives the same bytes. Accuracies are shares of right answers (0 to 1) of the int8 model on the reported windows.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """One device: accuracy on its own later windows, traffic in bytes, inference requests.

    `update_bytes` are the sealed update messages as published, `float32_bytes` what the same updates would have been
    as plain float32 vectors.
    """

    device: str
    group: str
    test_windows: int
    accuracy_first: float
    accuracy_last: float
    updates: int
    update_bytes: int
    float32_bytes: int
    sent_bytes: int
    received_bytes: int
    requests: int
    errors: int


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One round: how it ended, the federated validation accuracy of its head, what the gate said.

    `seconds` is None where time is virtual.
    """

    number: int
    state: str
    replies: int
    validation_accuracy: float | None
    decision: str
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ReleaseRow:
    """One release that the fleet ran: its int8 accuracy on all devices' later windows."""

    version: int
    round_number: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class SwapRow:
    """Inference through one hot swap on one device: requests answered by the version and those that failed."""

    device: str
    version: int
    requests: int
    errors: int


@dataclass(frozen=True, slots=True)
class FleetReport:
    """A whole run. `facts` are named values for the head of the page (model, strategy, broker …)."""

    title: str
    seed: int
    split_hash: str
    devices: tuple[DeviceRow, ...]
    rounds: tuple[RoundRow, ...]
    releases: tuple[ReleaseRow, ...]
    swaps: tuple[SwapRow, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def accuracy_first(self) -> float:
        """Share of right answers of the first bundle over all reported windows."""
        return _pooled(self.devices, "accuracy_first")

    @property
    def accuracy_last(self) -> float:
        """The same of the last release."""
        return _pooled(self.devices, "accuracy_last")

    @property
    def update_bytes_ratio(self) -> float:
        """Sealed update bytes over the bytes of the same updates as float32; NaN-free: 0 without updates."""
        plain = sum(row.float32_bytes for row in self.devices)
        return sum(row.update_bytes for row in self.devices) / plain if plain else 0.0

    @property
    def hold_backs(self) -> tuple[RoundRow, ...]:
        """Rounds whose head the gate did not let out."""
        return tuple(row for row in self.rounds if row.decision.startswith("held"))

    @property
    def round_seconds_median(self) -> float | None:
        """Median seconds of the rounds that were timed."""
        seconds = [row.seconds for row in self.rounds if row.seconds is not None]
        return statistics.median(seconds) if seconds else None

    def summary(self) -> dict[str, Any]:
        """The object that `--json` prints and `report.json` holds; times only where time was real."""
        timed = self.round_seconds_median
        values: dict[str, Any] = {
            "title": self.title,
            "seed": self.seed,
            "split_hash": self.split_hash,
            "accuracy_first": round(self.accuracy_first, 4),
            "accuracy_last": round(self.accuracy_last, 4),
            "update_bytes_ratio": round(self.update_bytes_ratio, 4),
            "rounds": len(self.rounds),
            "devices": len(self.devices),
            "releases": len(self.releases),
            "hold_backs": len(self.hold_backs),
            "inference_requests": sum(row.requests for row in self.devices),
            "inference_errors": sum(row.errors for row in self.devices),
            "facts": self.facts,
            "device_rows": [asdict(row) for row in self.devices],
            "round_rows": [asdict(row) for row in self.rounds],
            "release_rows": [asdict(row) for row in self.releases],
            "swap_rows": [asdict(row) for row in self.swaps],
        }
        if timed is None:
            for row in values["round_rows"]:
                del row["seconds"]
        else:
            values["round_seconds_median"] = round(timed, 3)
        return values

    def to_json(self) -> str:
        """`summary` as text, with sorted keys."""
        return json.dumps(self.summary(), indent=2, sort_keys=True) + "\n"


def _pooled(devices: tuple[DeviceRow, ...], name: str) -> float:
    windows = sum(row.test_windows for row in devices)
    return sum(getattr(row, name) * row.test_windows for row in devices) / windows if windows else 0.0


def render_table(report: FleetReport) -> str:
    """The table for a terminal, one line per device and the totals."""
    head = f"{'device':<16}{'group':<18}{'windows':>8}{'first':>8}{'last':>8}{'gain':>8}{'up kB':>10}{'down kB':>10}"
    lines = [report.title, "", head, "-" * len(head)]
    for row in report.devices:
        gain = row.accuracy_last - row.accuracy_first
        lines.append(
            f"{row.device:<16}{row.group:<18}{row.test_windows:>8}{row.accuracy_first:>8.3f}{row.accuracy_last:>8.3f}"
            f"{gain:>+8.3f}{row.sent_bytes / 1e3:>10.1f}{row.received_bytes / 1e3:>10.1f}"
        )
    lines.append("-" * len(head))
    lines.append(
        f"{'all':<34}{sum(row.test_windows for row in report.devices):>8}{report.accuracy_first:>8.3f}"
        f"{report.accuracy_last:>8.3f}{report.accuracy_last - report.accuracy_first:>+8.3f}"
    )
    lines += ["", *(f"{name}: {value}" for name, value in _figures(report).items())]
    return "\n".join(lines) + "\n"


def _figures(report: FleetReport) -> dict[str, str]:
    sent = sum(row.update_bytes for row in report.devices)
    plain = sum(row.float32_bytes for row in report.devices)
    requests = sum(row.requests for row in report.devices)
    errors = sum(row.errors for row in report.devices)
    figures = {
        "updates": f"{sent / 1e3:.0f} kB sealed, {plain / 1e3:.0f} kB as float32 ({report.update_bytes_ratio:.1%})",
        "rounds": f"{len(report.rounds)}, {len(report.releases)} releases, {len(report.hold_backs)} held back",
        "inference": f"{requests} requests, {errors} errors, through {len(report.swaps)} swaps",
        "seed": f"{report.seed}, split {report.split_hash[:16]}",
    }
    if report.round_seconds_median is not None:
        figures["round"] = f"{report.round_seconds_median:.2f} s (median)"
    return {**figures, **report.facts}
