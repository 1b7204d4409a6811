"""The aggregator's metrics: every one that there is, with what an operator does with it.

Laws of the file: no metric has a device, a person or a run as a label (the fleet's size must not be Prometheus's
trouble): labels are the closed sets that stand here; what must survive a restart is read from the database
(`metrics_reading.py`), what is counted here begins at 0 with the process. Source: docs/reference.md prints this file.
"""

from __future__ import annotations

from typing import Final, get_args

from cloud_server.checks import CHECKS
from cloud_server.db.devices import APPROVED, QUARANTINED, REVOKED
from cloud_server.enrolment.service import OUTCOMES
from cloud_server.release.gate import HoldReason
from cloud_server.remedies import RATIONED, pause_training
from cloud_server.screening import Refusal
from cloud_server.strikes import STRIKING
from process.metrics import OTHER, Counter, Gauge, Histogram, Registry
from wire.messages import CheckName, InferenceReport, RemedyName
from wire.transport import Packet

UP_TYPES: Final = ("st", "tm", "ir", "jn", "up", "nd", "rs", "es")
DOWN_TYPES: Final = ("rd", "cm", "ak", "md", "bl", "ea")
PRESENCES: Final = ("online", "offline", "lost", "never")
UPDATE_KINDS: Final = ("train", "evaluate")
END_STATES: Final = ("folded", "refused", "late", "discarded")
TUF_ROLES: Final = ("root", "targets", "parameters", "keys", "rings", "snapshot", "timestamp")
ROUND_SECONDS: Final = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 86_400.0)
STEPS: Final = ("fold", "calibrate", "decide")
RELEASED: Final = "released"

REMEDY_NAMES: Final = tuple(sorted(remedy.NAME for remedy in (pause_training, *RATIONED)))

REFUSED: Final[dict[str, str]] = {
    "topic": "topic",
    "signer": "signer",
    "signature": "signature",
    **dict.fromkeys(("device", "fleet", "direction", "type", "sender", "recipient"), "addressee"),
    "expired": "expired",
    **dict.fromkeys(("seen", "behind", "ReplayError"), "replayed"),
    **dict.fromkeys(("key", "content"), "decryption"),
    **dict.fromkeys(
        ("algorithm", "cbor", "digest", "extension", "header", "padding", "size", "structure"), "format"
    ),
    "MessageError": "body",
    "ChunkError": "chunk",
    "budget": "budget",
    "PeerError": "revoked",
}
"""Our log's words for a refused message, by the few that a person would act on differently."""


def refusal_reason(logged: str) -> str:
    """The label of a reason as `Inbox.refused_total` counts it (`tm: signature`)."""
    if logged.startswith("no upward topic"):
        return "topic"
    return REFUSED.get(logged.rpartition(": ")[2], OTHER)


class CloudMetrics:
    """All metrics of one aggregator."""

    def __init__(self) -> None:
        self.registry = Registry()
        self._declare_messages(self.registry)
        self._declare_devices(self.registry)
        self._declare_rounds(self.registry)
        self._declare_releases(self.registry)
        self.commit_seconds: Histogram = self.registry.histogram(
            "shoal_database_commit_seconds",
            "Commits to the database.",
            "Find a slow disk or database: every receipt waits for one commit.",
        )
        self._declare_health(self.registry)

    # ---- health ------------------------------------------------------------------------------------------------

    def _declare_health(self, registry: Registry) -> None:
        self.health: Gauge = registry.gauge(
            "shoal_health",
            "What each check of the aggregator found last: 0 ok, 1 a warning, 2 a failure.",
            "Alarm at 2; `shoal-cloud check` says what to do.",
            {"check": tuple(check.NAME for check in CHECKS)},
        )
        self.remedies: Counter = registry.counter(
            "shoal_remedies_total",
            "What the aggregator did about findings by itself.",
            "Growing: something comes back that it cannot mend for good; the log and the books say why.",
            {"remedy": REMEDY_NAMES},
        )
        self.fleet_unwell: Gauge = registry.gauge(
            "shoal_fleet_unwell",
            "Devices whose newest heartbeat says that a check fails.",
            "Alarm on many of one kind: they share a cause; the log (device_health) names them.",
            {"check": get_args(CheckName)},
        )
        self.fleet_remedies: Counter = registry.counter(
            "shoal_fleet_remedies_total",
            "What devices did about findings by themselves, as far as their heartbeats told.",
            "Rollbacks after a release: hold the rollout and look at the devices that went back.",
            {"remedy": get_args(RemedyName)},
        )

    # ---- messages ----------------------------------------------------------------------------------------------

    def _declare_messages(self, registry: Registry) -> None:
        up, down, where = {"type": UP_TYPES}, {"type": DOWN_TYPES}, {"direction": ("up", "down")}
        self.received: Counter = registry.counter(
            "shoal_messages_received_total",
            "Messages that the broker brought, refused ones too, by the first word of their topic.",
            "See whether the fleet speaks, and what of.",
            up,
        )
        self.received_bytes: Counter = registry.counter(
            "shoal_messages_received_bytes_total",
            "Payload bytes of those messages.",
            "See what devices on metered links pay for.",
            up,
        )
        self.refused: Counter = registry.counter(
            "shoal_messages_refused_total",
            "Messages that were dropped unread, by reason.",
            "Alarm on signature, signer or replayed: somebody forges; format after an upgrade: versions do not fit;"
            " budget: a device asks for the same content without end.",
            {"reason": sorted(set(REFUSED.values()))},
        )
        self.sent: Counter = registry.counter(
            "shoal_messages_sent_total",
            "Messages that the broker took.",
            "Compare ak with received up: without receipts devices send again.",
            down,
        )
        self.sent_bytes: Counter = registry.counter(
            "shoal_messages_sent_bytes_total",
            "Payload bytes of those messages.",
            "See what the broadcast of heads (bl) costs.",
            down,
        )
        self.dropped: Counter = registry.counter(
            "shoal_messages_dropped_total",
            "Messages downward that did not fit into a queue of ours.",
            "Above 0 the broker is too slow for the fleet; nothing is lost, all is asked for again.",
        )
        self.paused_reading: Counter = registry.counter(
            "shoal_reading_paused_total",
            "How often we stopped reading from the broker because too much waited.",
            "When it grows the event loop is too slow for the fleet; the broker keeps what is ours meanwhile.",
        )
        self.waiting: Gauge = registry.gauge(
            "shoal_messages_waiting",
            "Messages in our queues.",
            "Alarm when it stays high: the event loop (up) or the broker (down) does not keep up.",
            where,
        )
        self.transfers: Gauge = registry.gauge(
            "shoal_transfers_open",
            "Devices whose updates are arriving in chunks.",
            "See an upload wave, or transfers that never end.",
        )
        self.granted_bytes: Gauge = registry.gauge(
            "shoal_transfers_granted_bytes",
            "Memory that those updates are granted.",
            "Near the cap of 1 GiB transfers are put off: lower the cohort or broker.slot_bytes.",
        )
        self.broker_connected: Gauge = registry.gauge(
            "shoal_broker_connected",
            "1 while the broker answers, else 0.",
            "Alarm at 0: no round can run.",
        )
        self.broker_connected.set(0)
        self.broker_connections: Counter = registry.counter(
            "shoal_broker_connections_total",
            "Times that we connected to the broker.",
            "More than one a day: look at the broker's log and at the network.",
        )

    def note_received(self, packet: Packet) -> None:
        """Counts a packet that came up."""
        kind = _kind(packet.topic)
        self.received.add(type=kind)
        self.received_bytes.add(len(packet.payload), type=kind)

    def note_sent(self, packet: Packet) -> None:
        """Counts a packet that went down."""
        kind = _kind(packet.topic)
        self.sent.add(type=kind)
        self.sent_bytes.add(len(packet.payload), type=kind)

    def note_connected(self, is_connected: bool) -> None:
        """The broker came or went."""
        self.broker_connected.set(float(is_connected))
        if is_connected:
            self.broker_connections.add()

    # ---- the fleet ---------------------------------------------------------------------------------------------

    def _declare_devices(self, registry: Registry) -> None:
        self.devices: Gauge = registry.gauge(
            "shoal_devices",
            "Enrolled devices by approval and presence (never: it has not spoken yet).",
            "Alarm when few are approved and online; look into quarantined ones.",
            {"status": (APPROVED, QUARANTINED, REVOKED), "presence": PRESENCES},
        )
        self.devices_outdated: Gauge = registry.gauge(
            "shoal_devices_outdated",
            "Devices online that answer with another release than their ring's.",
            "Watch a rollout: it should fall to 0 within minutes of a release.",
        )
        self.certificates_expiring: Gauge = registry.gauge(
            "shoal_device_certificates_expiring",
            "Approved devices whose certificate ends within a day.",
            "They do not reach the aggregator's HTTPS port to renew it; after its end they renew by their update key,"
            " until enrolment.grace_days have passed.",
        )
        self.enrolments: Counter = registry.counter(
            "shoal_enrolments_total",
            "Requests for a certificate by what came of them, since the start.",
            "Alarm on claimed_twice: a token was stolen, or used twice; many refused ones: somebody guesses, or tokens"
            " are old; waiting ones want `shoal-cloud device approve`.",
            {"outcome": OUTCOMES},
        )
        self.inferences: Counter = registry.counter(
            "shoal_fleet_inferences_total",
            "Windows that devices reported to have answered, or to have failed to answer.",
            "Alarm on a share of failed ones; a new release that fails shows here first.",
            {"outcome": ("answered", "failed")},
        )
        self.feedback: Counter = registry.counter(
            "shoal_fleet_feedback_total",
            "Answers that somebody on the devices judged.",
            "The share of right ones is the quality in the field; compare it across releases.",
            {"outcome": ("right", "wrong")},
        )
        self.latency: Histogram = registry.histogram(
            "shoal_fleet_latency_p99_seconds",
            "99th percentile of the time of an answer, one observation for each report of a device.",
            "See whether a release is too slow for the slowest devices.",
        )
        self.fleet_outbox: Gauge = registry.gauge(
            "shoal_fleet_outbox_updates",
            "Updates that devices hold without a receipt, as last reported.",
            "Growing: receipts do not reach the fleet.",
        )
        self.fleet_samples: Gauge = registry.gauge(
            "shoal_fleet_labelled_samples",
            "Labelled windows on all devices, as last reported.",
            "Near 0 there is nothing to learn from: look at labels and retention.",
        )

    def note_report(self, report: InferenceReport) -> None:
        """Counts what a device reported since its last report."""
        errors = min(report.errors, report.requests)
        self.inferences.add(report.requests - errors, outcome="answered")
        self.inferences.add(errors, outcome="failed")
        right = min(report.feedback_correct, report.feedback_total)
        self.feedback.add(right, outcome="right")
        self.feedback.add(report.feedback_total - right, outcome="wrong")
        if report.requests:
            self.latency.observe(report.latency_p99_seconds)

    # ---- rounds ------------------------------------------------------------------------------------------------

    def _declare_rounds(self, registry: Registry) -> None:
        self.rounds: Counter = registry.counter(
            "shoal_rounds_total",
            "Rounds that ended, of all runs.",
            "Alarm when none is done for hours, or on failed ones in a row (`round list` says why).",
            {"state": ("done", "failed")},
        )
        self.round_seconds: Histogram = registry.histogram(
            "shoal_round_seconds",
            "Duration of the rounds that were done.",
            "Choose the deadline and the goal: a round lasts as long as its slowest device.",
            buckets=ROUND_SECONDS,
        )
        self.round_number: Gauge = registry.gauge(
            "shoal_round_number",
            "The round under way, or the last one.",
            "See that training moves.",
        )
        self.cohort: Gauge = registry.gauge(
            "shoal_round_cohort_devices",
            "Devices that were asked in the round under way; 0 between rounds.",
            "Compare with the devices online.",
        )
        self.replies: Gauge = registry.gauge(
            "shoal_round_replies",
            "Replies to the orders under way that are on the disk.",
            "A round that waits below its quorum will fail at its deadline.",
        )
        self.paused: Gauge = registry.gauge(
            "shoal_run_paused",
            "1 while the run is paused or no model was imported, else 0.",
            "Do not be alarmed that no round opens.",
        )
        self.paused.set(1)
        self.step_seconds: Histogram = registry.histogram(
            "shoal_round_step_seconds",
            "Folding the updates, making the head (refinement and ranges), gate and release.",
            "The event loop waits meanwhile; when a step nears a minute, use a GPU or a smaller holdout.",
            {"step": STEPS},
        )
        self.updates: Counter = registry.counter(
            "shoal_updates_total",
            "Replies to orders by how they ended.",
            "Late ones: raise the deadline; refused ones: look at the reasons; discarded ones: a round failed.",
            {"kind": UPDATE_KINDS, "state": END_STATES},
        )
        self.updates_refused: Counter = registry.counter(
            "shoal_updates_refused_total",
            "Refused and late replies by reason.",
            "not_finite or wrong_size after a release: the model diverges or an agent is broken.",
            {"reason": sorted(map(str, Refusal))},
        )
        self.strikes: Counter = registry.counter(
            "shoal_device_strikes_total",
            "Refused replies that were held against the device that signed them, by reason, since the start.",
            "One device: broken or hostile, `device show` tells; many after an upgrade: the new agent is broken.",
            {"reason": sorted(map(str, STRIKING))},
        )
        self.quarantines: Counter = registry.counter(
            "shoal_device_quarantines_total",
            "Devices that their strikes put into quarantine, since the start.",
            "Alarm on any: `device list` names them; `device approve` lets one back before its probation.",
        )
        self.updates_open: Gauge = registry.gauge(
            "shoal_updates_open",
            "Replies that are stored and wait for their round to end.",
            "They take disk space; above the cohort something does not end.",
            {"kind": UPDATE_KINDS},
        )

    # ---- releases and trust ------------------------------------------------------------------------------------

    def _declare_releases(self, registry: Registry) -> None:
        self.decisions: Counter = registry.counter(
            "shoal_gate_decisions_total",
            "Candidates that the gate released, or held back and why.",
            "no_gain for long: training has converged or learns nothing new; operator_worse: look at the data.",
            {"decision": (RELEASED, *sorted(map(str, HoldReason)))},
        )
        self.release_version: Gauge = registry.gauge(
            "shoal_release_version",
            "The release that the ring of new devices runs; 0 for none.",
            "Mark releases and rollbacks in every other graph.",
        )
        self.announcements: Counter = registry.counter(
            "shoal_release_announcements_total",
            "Times that the fleet was told of newly signed metadata.",
            "Without one in half of tuf.timestamp_days nothing is signed anew.",
        )
        self.tuf_expiry: Gauge = registry.gauge(
            "shoal_tuf_expiry_timestamp_seconds",
            "When the signature of a role expires, unix seconds.",
            "Alarm well before: after it devices take no release. Online roles are signed anew at half of their life;"
            " root and targets need the offline keys.",
            {"role": TUF_ROLES},
        )
        self.certificate_expiry: Gauge = registry.gauge(
            "shoal_certificate_expiry_timestamp_seconds",
            "When a certificate of the aggregator ends, unix seconds.",
            "Alarm a month before: a restart renews all but the CA's.",
            {"certificate": ("ca", "server", "broker", "aggregator")},
        )


def _kind(topic: str) -> str:
    """`up` of `fl/1/tenant/fleet/up/…`."""
    parts = topic.split("/", 5)
    return parts[4] if len(parts) > 4 else OTHER
