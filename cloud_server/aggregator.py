"""The aggregator: one place where packets, rounds and releases meet. Single-threaded, event by event.

Laws of the file: order and I/O only, no rule of its own; it never blocks, so the same object serves a real broker
(events from a queue) and a simulated fleet (events from a pump); a message that cannot be used ends there, not the
aggregator. Source: docs/architecture.md, "The aggregator".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cloud_server.clock_evidence import DeviceClocks
from cloud_server.db.devices import APPROVED, REVOKED
from cloud_server.downlink import Downlink
from cloud_server.fleet_health import FleetHealth
from cloud_server.inbox import Inbox
from cloud_server.influence import ReportBounds
from cloud_server.metrics import CloudMetrics
from cloud_server.registry import Registry
from cloud_server.release.announcer import Announcer
from cloud_server.rounds.intake import Arrival
from cloud_server.rounds.runner import RoundRunner
from cloud_server.sender import Sender
from process.clock import Clock
from process.logs import get_logger
from wire.envelope import Opened
from wire.errors import ShoalError, StorageError
from wire.messages import (
    Birth,
    InferenceReport,
    Join,
    MaskKeys,
    MaskOpened,
    MaskShares,
    Need,
    Receipt,
    Telemetry,
)
from wire.primitives import KemPrivateKey
from wire.topics import Topics
from wire.transport import Connected, Disconnected, Published, Received, Transport, TransportEvent

_log = get_logger("cloud.aggregator")

SWEEP_SECONDS = 10.0
GATHERED_BYTES = 16 * 1024 * 1024
"""Of updates that wait to be committed together; more than one are never kept waiting beyond it."""
REPEATED_AT_ONCE = 1024
"""Transfers that came again and wait for their answer, at most."""
SILENT_SECONDS = 360.0
"""A device that said nothing for this long is not asked before it speaks again. An agent's first heartbeat comes one to
two minutes after its birth, the others 60 to 72 s apart, and we note one a minute: two of them in a row may be lost."""


@dataclass(slots=True)
class Link:
    """The connection to the broker as it was reported, in monotonic seconds.

    Attributes:
        away_since: of a connection that is lost, or was never there; None while it stands.
        heard_at: when it came, or brought something last.
    """

    heard_at: float
    away_since: float | None = field(init=False)

    def __post_init__(self) -> None:
        self.away_since = self.heard_at

    def came(self, now: float) -> None:
        self.heard_at, self.away_since = now, None

    def went(self, now: float) -> None:
        """An attempt that fails is reported, too."""
        if self.away_since is None:
            self.away_since = now


class Aggregator:
    """Receives for one fleet and drives its run.

    Args:
        announcer: tells the fleet of releases, looked after at every `tick`.
        slot_bytes: largest sealed update of a device.
        silent_seconds: see `SILENT_SECONDS`.
        on_maintenance: chores that come every few seconds, such as signing timestamps again.
    """

    def __init__(
        self,
        *,
        topics: Topics,
        transport: Transport,
        registry: Registry,
        downlink: Downlink,
        sender: Sender,
        announcer: Announcer,
        metrics: CloudMetrics,
        kem_keys: tuple[KemPrivateKey, ...],
        clock: Clock,
        slot_bytes: int,
        silent_seconds: float = SILENT_SECONDS,
        on_maintenance: Callable[[], object] = lambda: None,
    ) -> None:
        self._topics = topics
        self._transport = transport
        self._registry = registry
        self._downlink = downlink
        self._sender = sender
        self._announcer = announcer
        self._metrics = metrics
        self._runner: RoundRunner | None = None
        self._clock = clock
        self._silent_seconds = silent_seconds
        self._on_maintenance = on_maintenance
        self._next_sweep = 0.0
        self._reports = ReportBounds(clock.monotonic())
        self._gathered: list[Arrival] = []
        self._gathered_bytes = 0
        self._repeated: set[tuple[str, bytes]] = set()
        self._present: frozenset[str] = frozenset()
        self._is_presence_news = False
        self.link = Link(clock.monotonic())
        self.fleet_health = FleetHealth()
        self.device_clocks = DeviceClocks()
        self.telemetry: dict[str, Telemetry] = {}
        self.inference: dict[str, InferenceReport] = {}
        self.inbox = Inbox(
            topics=topics,
            signers=registry.signers,
            is_known=lambda device: registry.status(device) not in ("", REVOKED),
            kem_keys={key.key_id: key for key in kem_keys},
            receiver=self,
            clock=clock,
            slot_bytes=slot_bytes,
        )

    def begin(self, runner: RoundRunner) -> None:
        """Drives a run that was resumed, from the next `tick` on."""
        self._runner = runner
        self._is_presence_news = True

    # ---- driven from outside -----------------------------------------------------------------------------------

    def start(self, deliver: Callable[[TransportEvent], None]) -> None:
        """Connects; `deliver` is called from the transport's thread and may only enqueue for `handle`."""
        filters = [(topic_filter, 1) for topic_filter in self._topics.cloud_filters()]
        self._transport.start(deliver, filters=filters)

    def handle(self, event: TransportEvent) -> None:
        """Takes one event of the transport."""
        match event:
            case Received(packet):
                self.link.heard_at = self._clock.monotonic()
                self._metrics.note_received(packet)
                self.inbox.receive(packet)
            case Published():
                self._sender.pump()
            case Connected():
                self._metrics.note_connected(True)
                self.link.came(self._clock.monotonic())
                _log.info("broker_connected", max_packet_bytes=event.max_packet_bytes)
                self._sender.pump()
            case Disconnected(reason):
                self._metrics.note_connected(False)
                self.link.went(self._clock.monotonic())
                _log.warning("broker_lost", reason=reason)

    def tick(self) -> float:
        """Does all that is due and returns when it wants to be called again (unix seconds).

        Raises:
            StorageError: (operator) another aggregator was started on this database: this one signs and says nothing
                more. Or (disk) the database failed.
        """
        self._registry.check_writer()
        self._commit_gathered()
        now = self._clock.now()
        if now >= self._next_sweep or self._next_sweep - now > SWEEP_SECONDS:
            self._next_sweep = now + SWEEP_SECONDS
            self._sweep(now)
        self._sender.pump()
        wake = self._next_sweep
        if self._runner is not None:
            # Once for all that came and went since the last tick: a fleet that boots costs one look, not one a device.
            if self._is_presence_news:
                self._is_presence_news = False
                self._runner.on_nodes_changed()
            wake = min(wake, self._runner.tick())
        return min(wake, self._announcer.tick())

    def stop(self) -> None:
        """Leaves the broker; the database has all that matters, and what is not in it has no receipt."""
        self._transport.stop()

    # ---- what opened messages mean -----------------------------------------------------------------------------

    def on_birth(self, device: str, birth: Birth) -> None:
        is_back = self._registry.is_back(device, birth)
        self._is_presence_news |= self._registry.note_birth(device, birth)
        _log.info("device_" + birth.status, device=device, release=birth.release_version)
        if self._runner is None:
            return
        if birth.status == "lost":
            self._runner.on_node_lost(device)
        elif is_back:
            self._runner.on_node_returned(device)

    def on_telemetry(self, device: str, telemetry: Telemetry) -> None:
        self.telemetry[device] = telemetry
        self.fleet_health.note(device, telemetry, self._clock.monotonic())
        self._seen(device, telemetry.release_version)

    def on_clock(self, device: str, told: float) -> None:
        self.device_clocks.note(device, told, self._clock.monotonic())

    def on_inference_report(self, device: str, report: InferenceReport) -> None:
        self.inference[device] = report
        if self._registry.status(device) == APPROVED:
            self._metrics.note_report(self._reports.counted(device, report, self._clock.monotonic()))
        self._seen(device, report.release_version)

    def on_join(self, device: str, join: Join) -> None:
        if not join.accepted:
            _log.info("order_declined", device=device, reason=join.reason)
        if self._runner is not None:
            self._runner.on_join(device, join)

    def on_masking(self, device: str, body: MaskKeys | MaskShares | MaskOpened) -> None:
        if self._runner is not None:
            self._runner.on_masking(device, body)

    def on_need(self, device: str, need: Need) -> None:
        self._downlink.answer_need(device, need)

    def is_answered(self, device: str, transfer: bytes) -> bool:
        return self._runner is not None and self._runner.intake.given.find(device, transfer) is not None

    def on_repeated(self, device: str, transfer: bytes) -> None:
        """Answered with the next `tick`, once however often it came until then; too many are offered once more."""
        if len(self._repeated) < REPEATED_AT_ONCE:
            self._repeated.add((device, transfer))

    def on_missing(self, device: str, receipt: Receipt) -> None:
        self._downlink.send_receipt(device, receipt)

    def on_update(self, device: str, opened: Opened, transfer: bytes, size_bytes: int) -> None:
        """Gathered until the next `tick`: one commit for all that came, since each waits for the disk."""
        if self._runner is None:
            return
        self._gathered.append(Arrival(device, opened.header, opened.body, transfer, size_bytes))
        self._gathered_bytes += size_bytes
        if self._gathered_bytes >= GATHERED_BYTES:
            self._commit_updates()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _commit_gathered(self) -> None:
        """What came since the last turn, before anything follows from it."""
        self._commit_updates()
        self._answer_repeated()
        try:
            self._registry.write_presence()
        except StorageError as error:
            # Kept in memory, and tried again with what comes next.
            _log.error("presence_not_written", error=str(error), hint=error.hint)

    def _commit_updates(self) -> None:
        """Together; where that fails, one by one, so that no reply is in the way of the others."""
        arrivals, self._gathered, self._gathered_bytes = self._gathered, [], 0
        if self._runner is None or not arrivals:
            return
        try:
            receipts = self._runner.on_updates(arrivals)
        except StorageError as error:
            if len(arrivals) > 1:
                _log.warning("updates_not_stored_together", updates=len(arrivals), error=str(error))
            for arrival in arrivals:
                self._commit_update(self._runner, arrival)
            return
        for arrival, receipt in zip(arrivals, receipts, strict=True):
            self._downlink.send_receipt(arrival.device, receipt)

    def _answer_repeated(self) -> None:
        repeated, self._repeated = sorted(self._repeated), set()
        if self._runner is None or not repeated:
            return
        try:
            receipts = self._runner.intake.answer_again(repeated)
        except StorageError as error:
            _log.error("repeats_not_answered", updates=len(repeated), error=str(error))
            return
        for device, receipt in receipts:
            self._downlink.send_receipt(device, receipt)

    def _commit_update(self, runner: RoundRunner, arrival: Arrival) -> None:
        try:
            (receipt,) = runner.on_updates([arrival])
        except StorageError as error:
            # No receipt: the device keeps the update and sends it again.
            _log.error("update_not_stored", device=arrival.device, error=str(error))
            return
        self._downlink.send_receipt(arrival.device, receipt)

    def _seen(self, device: str, release_version: int) -> None:
        self._is_presence_news |= self._registry.note_seen(device, release_version)

    def _sweep(self, now: float) -> None:
        """Devices that fell silent without a last will or were approved or revoked meanwhile, and the chores of the
        repository."""
        for device, row in self._registry.presence().items():
            if row.status == "online" and now - row.last_seen > self._silent_seconds:
                _log.info("device_silent", device=device, seconds=round(now - row.last_seen))
                self._registry.note_lost(device)
        self._registry.end_probations()
        present = frozenset(self._registry.present())
        self._is_presence_news |= present != self._present
        self._present = present
        try:
            self._on_maintenance()
        except ShoalError as error:
            _log.error("maintenance_failed", error=str(error), hint=error.hint)
