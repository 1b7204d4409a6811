"""Where the aggregator's metrics come from that others keep: the books, the register, queues, signatures.

Laws of the file: it reads and changes nothing; it is called from the metrics port's thread, so what the event loop
changes is copied in one step; a reading of the books costs a pass over every update there is, so it is repeated at
most so often that it takes a twentieth of the time.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from cloud_server.assembly import Assembled, Base
from cloud_server.db.devices import APPROVED
from cloud_server.db.overview import Totals, load_totals
from cloud_server.enrolment.ca import certificate_ends
from cloud_server.fleet_health import FleetHealth
from cloud_server.health import CloudHealth
from cloud_server.metrics import END_STATES, RELEASED, CloudMetrics, refusal_reason
from cloud_server.rounds.runner import RoundRunner
from process.clock import Clock
from process.metrics import Observed

BOOKS_SECONDS = 5.0
SIGNATURES_SECONDS = 60.0
EXPIRING_SECONDS = 86_400.0
_SHARE = 20.0

T = TypeVar("T")


class Throttled(Generic[T]):
    """A reading that is kept for a while, the longer the more it costs. From any thread."""

    def __init__(self, read: Callable[[], T], clock: Clock, least_seconds: float) -> None:
        self._read = read
        self._clock = clock
        self._least_seconds = least_seconds
        self._lock = threading.Lock()
        self._kept: tuple[T] | None = None
        self._until = 0.0

    def __call__(self) -> T:
        """The reading of now, or of not long ago; raises what the reading raises."""
        with self._lock:
            started = self._clock.monotonic()
            if self._kept is None or started >= self._until:
                self._kept = (self._read(),)
                ended = self._clock.monotonic()
                self._until = ended + max(self._least_seconds, _SHARE * (ended - started))
            return self._kept[0]


@dataclass(frozen=True, slots=True)
class EventQueue:
    """What the service's loop tells of its queue: how many events wait, and how often it stopped the reading."""

    waiting: Callable[[], int]
    paused: Callable[[], int]


def read_metrics(
    metrics: CloudMetrics,
    base: Base,
    assembled: Assembled,
    *,
    ring: str,
    authority: Path,
    runner: Callable[[], RoundRunner | None],
    events: EventQueue,
) -> None:
    """Lets the metrics be read from what they are about.

    Args:
        ring: of new devices.
        authority: the folder with the aggregator's certificates.
        runner: gives the run under way, None while there is none.
    """
    _read_queues(metrics, assembled, events)
    _read_devices(metrics, base, assembled)
    _read_round(metrics, runner)
    books = Throttled(lambda: _totals(base, metrics, ring), base.clock, BOOKS_SECONDS)
    _read_books(metrics, books, runner)
    expiries = Throttled(base.repository.expiries, base.clock, SIGNATURES_SECONDS)
    metrics.tuf_expiry.read_from(expiries)
    metrics.certificate_expiry.read_from(lambda: certificate_ends(authority))
    metrics.announcements.read_from(lambda: assembled.announcer.announced_total)
    base.database.on_commit = metrics.commit_seconds.observe


def read_health(metrics: CloudMetrics, health: CloudHealth, fleet: FleetHealth) -> None:
    """Lets the metrics be read that tell of the service's own health and of what devices say of theirs."""
    metrics.health.read_from(health.levels)
    metrics.remedies.read_from(
        lambda: {name: float(count) for name, count in dict(health.remedies_total).items()}
    )
    metrics.fleet_unwell.read_from(fleet.unwell)
    metrics.fleet_remedies.read_from(fleet.remedies)


def _read_queues(metrics: CloudMetrics, assembled: Assembled, events: EventQueue) -> None:
    inbox, sender = assembled.aggregator.inbox, assembled.sender

    def refused() -> dict[str, float]:
        counted: Counter[str] = Counter()
        for reason, count in dict(inbox.refused_total).items():
            counted[refusal_reason(reason)] += count
        return {reason: float(count) for reason, count in counted.items()}

    metrics.refused.read_from(refused)
    metrics.dropped.read_from(lambda: sender.dropped_total)
    metrics.paused_reading.read_from(events.paused)
    metrics.waiting.read_from(lambda: {"up": events.waiting(), "down": sender.backlog})
    metrics.transfers.read_from(lambda: inbox.open_transfers)
    metrics.granted_bytes.read_from(lambda: inbox.granted_bytes)


def _read_devices(metrics: CloudMetrics, base: Base, assembled: Assembled) -> None:
    registry, aggregator = base.registry, assembled.aggregator

    def devices() -> dict[tuple[str, ...], float]:
        presence = registry.presence()
        counted = Counter(
            (row.status, presence[row.device].status if row.device in presence else "never")
            for row in registry.devices()
        )
        return {key: float(count) for key, count in counted.items()}

    def outdated() -> float:
        presence, rings = registry.presence(), {row.device: row.ring for row in registry.devices()}
        online = [row for row in presence.values() if row.status == "online" and row.device in rings]
        current = {
            ring: base.publisher.current_version(ring) for ring in {rings[row.device] for row in online}
        }
        return sum(row.release_version != current[rings[row.device]] for row in online)

    def expiring() -> float:
        until = base.clock.now() + EXPIRING_SECONDS
        return sum(
            row.status == APPROVED and 0 < row.certificate_not_after < until for row in registry.devices()
        )

    # A pass over all devices, so at most a twentieth of the time.
    metrics.devices.read_from(Throttled(devices, base.clock, 0.0))
    metrics.devices_outdated.read_from(Throttled(outdated, base.clock, BOOKS_SECONDS))
    metrics.certificates_expiring.read_from(Throttled(expiring, base.clock, 0.0))
    metrics.fleet_outbox.read_from(lambda: sum(each.outbox for each in list(aggregator.telemetry.values())))
    metrics.fleet_samples.read_from(
        lambda: sum(each.labelled_samples for each in list(aggregator.telemetry.values()))
    )


def _read_round(metrics: CloudMetrics, runner: Callable[[], RoundRunner | None]) -> None:
    def of_round(what: Callable[[RoundRunner], float]) -> Callable[[], float]:
        def read() -> float:
            current = runner()
            return what(current) if current is not None else 0.0

        return read

    metrics.round_number.read_from(of_round(lambda current: current.view().round_number))
    metrics.cohort.read_from(of_round(lambda current: current.view().cohort))
    metrics.replies.read_from(of_round(lambda current: current.view().answered))
    metrics.quarantines.read_from(of_round(lambda current: float(current.intake.quarantined_total)))

    def strikes() -> dict[str, float]:
        current = runner()
        counted = {} if current is None else dict(current.intake.strikes_total)
        return {reason: float(count) for reason, count in counted.items()}

    metrics.strikes.read_from(strikes)


def _totals(base: Base, metrics: CloudMetrics, ring: str) -> Totals:
    with base.database.read() as connection:
        return load_totals(connection, ring=ring, bounds=metrics.round_seconds.buckets)


def _read_books(
    metrics: CloudMetrics, books: Callable[[], Totals], runner: Callable[[], RoundRunner | None]
) -> None:
    def updates() -> dict[tuple[str, ...], float]:
        counted: Counter[tuple[str, ...]] = Counter()
        for (kind, state, _), count in books().updates.items():
            if state in END_STATES:
                counted[kind, state] += count
        return {key: float(count) for key, count in counted.items()}

    def refused() -> dict[str, float]:
        counted: Counter[str] = Counter()
        for (_, state, reason), count in books().updates.items():
            if state in ("refused", "late"):
                counted[reason] += count
        current = runner()
        if current is not None:
            counted.update(dict(current.intake.unbooked_total))
        return {key: float(count) for key, count in counted.items()}

    def stored() -> dict[str, float]:
        counted: Counter[str] = Counter()
        for (kind, state, _), count in books().updates.items():
            if state == "stored":
                counted[kind] += count
        return {key: float(count) for key, count in counted.items()}

    def decisions() -> dict[str, float]:
        totals = books()
        return {**totals.held, RELEASED: totals.released}

    def durations() -> Observed:
        totals = books()
        return Observed(totals.round_buckets, totals.round_seconds)

    metrics.rounds.read_from(lambda: books().rounds)
    metrics.round_seconds.read_from(durations)
    metrics.updates.read_from(updates)
    metrics.updates_refused.read_from(refused)
    metrics.updates_open.read_from(stored)
    metrics.decisions.read_from(decisions)
    metrics.release_version.read_from(lambda: books().release_version)
