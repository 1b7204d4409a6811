"""What a fleet's run came to, as one value: the rows behind the table, the JSON and the page.

Laws of the file: values only, nothing is measured here; `summary` of a simulation holds no times, so that the same seed
gives the same bytes. A score is the task's metric of the int8 model on the reported windows: the share of right answers
(0 to 1), or an autoencoder's mean squared error.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """One device: scores on its own later windows, traffic in bytes, inference requests.

    `update_bytes` are the sealed update messages as published, `float32_bytes` what the same updates would have been
    as plain float32 vectors.
    """

    device: str
    group: str
    test_windows: int
    first: float
    last: float
    updates: int
    update_bytes: int
    float32_bytes: int
    sent_bytes: int
    received_bytes: int
    requests: int
    errors: int


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One round: how it ended, the federated score of its head on validation windows, what the gate said.

    `seconds` is None where time is virtual.
    """

    number: int
    state: str
    replies: int
    validation: float | None
    decision: str
    seconds: float | None = None

    @property
    def is_held(self) -> bool:
        """Whether the gate kept the round's head from the devices."""
        return self.decision.startswith("held")


@dataclass(frozen=True, slots=True)
class ReleaseRow:
    """One release that the fleet ran, on all devices' later windows.

    Attributes:
        round_number: that it came from; 0 for the first bundle.
        int8: score of the file that devices serve.
        float32: score of the same parameters as they were before they were quantized.
        separation: for an anomaly score: how well it tells what nobody trained on from these windows (AUC, 0 to 1).
    """

    version: int
    round_number: int
    int8: float
    float32: float
    separation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SwapRow:
    """Inference through one hot swap on one device: requests answered by the version and those that failed."""

    device: str
    version: int
    requests: int
    errors: int


@dataclass(frozen=True, slots=True)
class FleetReport:
    """A whole run.

    Attributes:
        metric: the task's, `accuracy` or `mse`; the scores of all rows are of this one.
        facts: named values for the head of the page (model, strategy, broker …).
        attack_success: for a backdoor: share of the later windows with its trigger, of other labels, that the last
            release answers with its target.
    """

    title: str
    seed: int
    split_hash: str
    devices: tuple[DeviceRow, ...]
    rounds: tuple[RoundRow, ...]
    releases: tuple[ReleaseRow, ...]
    swaps: tuple[SwapRow, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    metric: str = "accuracy"
    higher_is_better: bool = True
    attack_success: float | None = None

    @property
    def first(self) -> float:
        """Score of the first bundle over all reported windows."""
        return _pooled(self.devices, "first")

    @property
    def last(self) -> float:
        """The same of the last release."""
        return _pooled(self.devices, "last")

    def gain(self, row: DeviceRow | None = None) -> float:
        """How much better the last release is than the first, in the metric's unit, for one device or for all."""
        first, last = (self.first, self.last) if row is None else (row.first, row.last)
        return last - first if self.higher_is_better else first - last

    def shown(self, score: float) -> str:
        """A score for people: a share in per cent, an error as it is."""
        return f"{score:.1%}" if self.metric == "accuracy" else f"{score:.4f}"

    def shown_gain(self, gain: float) -> str:
        """A gain for people, in `gain_unit`."""
        return f"{gain * 100:+.1f}" if self.metric == "accuracy" else f"{gain:+.4f}"

    @property
    def gain_unit(self) -> str:
        """What gains are counted in."""
        return "points" if self.metric == "accuracy" else self.metric

    @property
    def update_bytes(self) -> int:
        """Bytes of all sealed updates."""
        return sum(row.update_bytes for row in self.devices)

    @property
    def float32_bytes(self) -> int:
        """Bytes of the same updates as plain float32."""
        return sum(row.float32_bytes for row in self.devices)

    @property
    def update_bytes_ratio(self) -> float:
        """The one over the other; 0 without updates."""
        return self.update_bytes / self.float32_bytes if self.float32_bytes else 0.0

    @property
    def requests(self) -> int:
        """Inference requests of all devices."""
        return sum(row.requests for row in self.devices)

    @property
    def errors(self) -> int:
        """Inference requests that failed or were not answered."""
        return sum(row.errors for row in self.devices)

    @property
    def hold_backs(self) -> tuple[RoundRow, ...]:
        """Rounds whose head the gate did not let out."""
        return tuple(row for row in self.rounds if row.is_held)

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
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            f"{self.metric}_first": round(self.first, 4),
            f"{self.metric}_last": round(self.last, 4),
            "update_bytes_ratio": round(self.update_bytes_ratio, 4),
            "rounds": len(self.rounds),
            "devices": len(self.devices),
            "releases": len(self.releases),
            "hold_backs": len(self.hold_backs),
            "inference_requests": self.requests,
            "inference_errors": self.errors,
            "facts": self.facts,
            "device_rows": [asdict(row) for row in self.devices],
            "round_rows": [asdict(row) for row in self.rounds],
            "release_rows": [asdict(row) for row in self.releases],
            "swap_rows": [asdict(row) for row in self.swaps],
        }
        if self.attack_success is not None:
            values["attack_success"] = round(self.attack_success, 4)
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
    head = f"{'device':<18}{'windows':>8}{'first':>9}{'last':>9}{'gain':>9}{'up kB':>10}{'down kB':>10}"
    name = f"int8 {report.metric} on later windows, first bundle against last release"
    lines = [report.title, name, "", head, "-" * len(head)]
    for row in report.devices:
        traffic = f"{row.sent_bytes / 1e3:>10.1f}{row.received_bytes / 1e3:>10.1f}"
        lines.append(_scores(row.device, row.test_windows, row.first, row.last, report.gain(row)) + traffic)
    lines.append("-" * len(head))
    windows = sum(row.test_windows for row in report.devices)
    sent, received = (
        sum(getattr(row, key) for row in report.devices) for key in ("sent_bytes", "received_bytes")
    )
    total = _scores("all", windows, report.first, report.last, report.gain())
    lines.append(f"{total}{sent / 1e3:>10.1f}{received / 1e3:>10.1f}")
    lines += ["", *(f"{name}: {value}" for name, value in _figures(report).items())]
    return "\n".join(lines) + "\n"


def _scores(name: str, windows: int, first: float, last: float, gain: float) -> str:
    return f"{name:<18}{windows:>8}{first:>9.3f}{last:>9.3f}{gain:>+9.3f}"


def _figures(report: FleetReport) -> dict[str, str]:
    held = ", ".join(f"{row.number} ({row.decision.removeprefix('held: ')})" for row in report.hold_backs)
    figures = {
        "updates": f"{report.update_bytes / 1e3:.0f} kB sealed, {report.float32_bytes / 1e3:.0f} kB as float32 "
        f"({report.update_bytes_ratio:.1%})",
        "rounds": f"{len(report.rounds)}, {len(report.releases)} releases, {len(report.hold_backs)} held back",
        "held back": held or "none",
        "inference": f"{report.requests} requests, {report.errors} errors, through {len(report.swaps)} swaps",
        "seed": f"{report.seed}, split {report.split_hash[:16]}",
    }
    if report.releases:
        figures["last release as float32"] = report.shown(report.releases[-1].float32)
        figures |= {f"AUC, {name}": f"{auc:.3f}" for name, auc in report.releases[-1].separation.items()}
    if report.attack_success is not None:
        figures["attack success"] = f"{report.attack_success:.1%} of later windows with the trigger"
    if report.round_seconds_median is not None:
        figures["round"] = f"{report.round_seconds_median:.2f} s (median)"
    return {**figures, **report.facts}
