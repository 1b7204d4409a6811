"""The agent's metrics: every one that there is, with what somebody does with it.

Laws of the file: read only, and only when somebody wants to see them; labels are the closed sets that stand here.
Source: docs/reference.md prints this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final, get_args

from edge_agent.checks import CHECKS
from edge_agent.device_state import State
from edge_agent.parts import Parts
from edge_agent.ports import JobKind
from edge_agent.remedies import RATIONED, pause_training, roll_back
from edge_agent.store.outbox import END_STATES
from edge_agent.vitals.health import Health
from edge_agent.vitals.tally import LATENCY_SECONDS
from process.metrics import Counter, Gauge, Histogram, Observed, Registry

KINDS: Final[tuple[str, ...]] = get_args(JobKind)
CHECK_NAMES: Final = tuple(check.NAME for check in CHECKS)
REMEDY_NAMES: Final = tuple(sorted(remedy.NAME for remedy in (roll_back, pause_training, *RATIONED)))


class EdgeMetrics:
    """All metrics of one agent."""

    def __init__(self) -> None:
        self.registry = Registry()
        self._declare_answers(self.registry)
        self._declare_learning(self.registry)
        self._declare_surroundings(self.registry)

    def _declare_answers(self, registry: Registry) -> None:
        self.inferences: Counter = registry.counter(
            "shoal_edge_inferences_total",
            "Windows by how they ended: failed in the model, refused for their shape or values.",
            "Alarm when failed grows; refused ones are the caller's: look at the sensor's reader.",
            {"outcome": ("answered", "failed", "refused")},
        )
        self.latency: Histogram = registry.histogram(
            "shoal_edge_inference_seconds",
            "Time of an answer, as its caller waits for it.",
            "See whether the device keeps its rate, also while it trains.",
            buckets=LATENCY_SECONDS,
        )
        self.release_version: Gauge = registry.gauge(
            "shoal_edge_release_version",
            "The release that answers; 0 for none.",
            "Compare with the aggregator's shoal_release_version.",
        )
        self.probation: Gauge = registry.gauge(
            "shoal_edge_release_on_probation",
            "1 while a new release is watched and may still go back, else 0.",
            "Do not restart the device then without need.",
        )
        self.swaps: Counter = registry.counter(
            "shoal_edge_swaps_total",
            "Changes of the model that answers.",
            "A rollback means that a release failed here: read the log around it.",
            {"cause": ("release", "rollback")},
        )

    def _declare_learning(self, registry: Registry) -> None:
        kind = {"kind": KINDS}
        self.samples: Gauge = registry.gauge(
            "shoal_edge_samples",
            "Windows kept to learn from and to evaluate on.",
            "Without train ones the device declines to train: bring labels.",
            {"split": ("train", "val", "unlabelled")},
        )
        self.sample_bytes: Gauge = registry.gauge(
            "shoal_edge_sample_bytes",
            "Disk space of those windows.",
            "At storage.sample_bytes the oldest go first.",
        )
        self.jobs: Counter = registry.counter(
            "shoal_edge_jobs_total",
            "Jobs of the worker: training, evaluation, release checks (update).",
            "Failed updates: HTTPS to the aggregator does not work; failed training: read the log.",
            {**kind, "outcome": ("done", "failed")},
        )
        self.job_seconds: Counter = registry.counter(
            "shoal_edge_job_seconds_total",
            "Time that those jobs took.",
            "See what training costs this device; bound it by training.max_steps.",
            kind,
        )
        self.steps: Counter = registry.counter(
            "shoal_edge_training_steps_total",
            "Optimizer steps.",
            "Divide the seconds of train jobs by it to compare devices.",
        )
        self.outbox: Gauge = registry.gauge(
            "shoal_edge_outbox_updates",
            "Updates and evaluations without a receipt.",
            "Above 0 for hours: the aggregator does not receive, or its receipts do not come back.",
        )
        self.outbox_bytes: Gauge = registry.gauge(
            "shoal_edge_outbox_bytes",
            "Disk space of the outbox.",
            "At storage.outbox_bytes the oldest update is given up.",
        )
        self.updates: Counter = registry.counter(
            "shoal_edge_updates_total",
            "Updates and evaluations by how they ended, since the device's database was made.",
            "stored is what counts; refused: the log names the reason; destroyed: the disk fails.",
            {"state": END_STATES},
        )
        self.sends: Counter = registry.counter(
            "shoal_edge_update_sends_total",
            "Times that an update, or missing chunks of one, were sent.",
            "Several for each update: the link or the broker loses messages.",
        )

    def _declare_surroundings(self, registry: Registry) -> None:
        directions = {"direction": ("up", "down")}
        self.connected: Gauge = registry.gauge(
            "shoal_edge_broker_connected",
            "1 while the broker answers, else 0.",
            "At 0 the device answers and waits; alarm after a day.",
        )
        self.connections: Counter = registry.counter(
            "shoal_edge_broker_connections_total",
            "Times that the device connected to the broker.",
            "See a link that comes and goes.",
        )
        self.bytes: Counter = registry.counter(
            "shoal_edge_message_bytes_total",
            "Bytes of topics and payloads sent, and of messages and files received.",
            "See what a metered link pays for.",
            directions,
        )
        self.link_open: Gauge = registry.gauge(
            "shoal_edge_link_open",
            "1 while updates, downloads and reports may use the link, else 0.",
            "At 0 outside of its windows: as it should be; else its budget is spent.",
        )
        self.link_spent: Gauge = registry.gauge(
            "shoal_edge_link_spent_bytes",
            "What a link with limits has cost in this day and month of the budget, TLS, TCP and IP included.",
            "Compare with link.bytes_per_day and link.bytes_per_month, and with the bill.",
            {"period": ("day", "month")},
        )
        self.dropped: Counter = registry.counter(
            "shoal_edge_messages_dropped_total",
            "Messages that did not fit our queue (up), or could not be verified or used (down).",
            "Growing down: somebody forges, or the aggregator's keys changed and HTTPS does not work.",
            directions,
        )
        self.clock_behind: Gauge = registry.gauge(
            "shoal_edge_clock_behind_seconds",
            "How far the machine's clock is behind what the aggregator signed; 0 when it is not.",
            "Set the clock (NTP): until then expiries are counted from that floor.",
        )
        self.disk_free: Gauge = registry.gauge(
            "shoal_edge_disk_free_bytes",
            "Free space on the disk of the state folder.",
            "Alarm below the size of a release: the device answers, but takes no new one.",
        )
        self.health: Gauge = registry.gauge(
            "shoal_edge_health",
            "What each check found last: 0 ok, 1 a warning, 2 a failure.",
            "Alarm at 2; `shoal-edge check` says what to do.",
            {"check": CHECK_NAMES},
        )
        self.remedies: Counter = registry.counter(
            "shoal_edge_remedies_total",
            "What the agent did about findings by itself.",
            "Growing: something comes back that the device cannot mend for good; the log says why.",
            {"remedy": REMEDY_NAMES},
        )

    def read_health(self, health: Health) -> None:
        """Lets what is known of the device's health be read; from any thread."""
        self.health.read_from(health.levels)
        self.remedies.read_from(
            lambda: {str(name): float(count) for name, count in dict(health.remedies_total).items()}
        )

    def read_from(
        self, parts: Parts, state: Callable[[], State], refused: Callable[[], int], folder: Path
    ) -> None:
        """Lets the metrics be read from an agent; from any thread.

        Args:
            state: of the state machine, now.
            refused: messages that could not be used so far.
            folder: the state folder.
        """
        self._read_answers(parts)
        self._read_learning(parts)
        outgoing = parts.outgoing
        self.connected.read_from(lambda: float(state().connected))
        self.connections.read_from(lambda: parts.tally.connections_total)
        self.bytes.read_from(lambda: {"up": outgoing.sent_bytes_total, "down": parts.received_bytes_total})
        self.link_open.read_from(lambda: float(parts.link.view.is_open))
        self.link_spent.read_from(
            lambda: {"day": parts.link.view.spent_day, "month": parts.link.view.spent_month}
        )
        self.dropped.read_from(lambda: {"up": outgoing.dropped_total, "down": refused()})
        self.clock_behind.read_from(lambda: parts.clock.behind_seconds)
        self.disk_free.read_from(lambda: _free_bytes(folder))

    def _read_answers(self, parts: Parts) -> None:
        serving, tally = parts.serving, parts.tally

        def inferences() -> dict[str, float]:
            total = serving.total
            return {
                "answered": total.requests - total.errors,
                "failed": total.errors,
                "refused": serving.bad_input_total,
            }

        def version() -> float:
            model = serving.current
            return model.release_version if model is not None else 0

        self.inferences.read_from(inferences)
        self.latency.read_from(lambda: Observed(*tally.latencies()))
        self.release_version.read_from(version)
        self.probation.read_from(lambda: float(parts.slots.on_probation))
        self.swaps.read_from(lambda: dict(tally.swaps))

    def _read_learning(self, parts: Parts) -> None:
        samples, outbox, tally = parts.samples, parts.outbox, parts.tally

        def kept() -> dict[str, float]:
            counts = samples.counts()
            unlabelled = counts["samples"] - counts["labelled"]
            return {"train": counts["train"], "val": counts["val"], "unlabelled": unlabelled}

        self.samples.read_from(kept)
        self.sample_bytes.read_from(lambda: samples.counts()["bytes"])
        self.jobs.read_from(lambda: {key: float(count) for key, count in dict(tally.jobs).items()})
        self.job_seconds.read_from(lambda: dict(tally.job_seconds))
        self.steps.read_from(lambda: tally.training_steps_total)
        self.outbox.read_from(outbox.depth)
        self.outbox_bytes.read_from(outbox.open_bytes)
        self.updates.read_from(outbox.totals)
        self.sends.read_from(lambda: tally.update_sends_total)


def _free_bytes(folder: Path) -> float | None:
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return float(disk.f_bavail * disk.f_frsize)
