"""The settings of an agent: one TOML file and `SHOAL_EDGE_…` variables over it, frozen and bounded.

Law of the file: every option has a default, a unit, a bound and one sentence; where an agent connects to and
which keys it trusts is not here but in its identity (enrolment). Source: docs/reference.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from edge_agent.device_state import Timing
from edge_agent.link.door import LOOK_SECONDS, plan_of
from edge_agent.rounds.learning import TrainPolicy
from process.health import Mode
from process.options import option
from process.settings import LogSettings, load_settings
from wire.backoff import Backoff

TOKEN_VARIABLE = "SHOAL_ENROLL_TOKEN"
TOKEN_FILE_VARIABLE = "SHOAL_ENROLL_TOKEN_FILE"
VARIABLE_PREFIX = "SHOAL_EDGE_"
WATCH_SECONDS = 5.0
"""Between two looks at a new release, if something would be done about it."""


class InferenceSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[inference]`"""

    variant: Annotated[
        Literal["auto", "int8", "float32"],
        option(
            "Which model file serves; auto measures both when a release is installed and keeps the faster."
        ),
    ] = "auto"
    recent_windows: Annotated[
        int, option("Answered windows kept in memory until a label for them arrives.", ge=0, le=1_000_000)
    ] = 256
    recent_bytes: Annotated[int, option("Most bytes of those windows.", ge=0, le=2**32)] = 4 * 2**20


class TrainingSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[training]`: what the device is willing to do, whatever the cloud asks for."""

    enabled: Annotated[bool, option("Whether this device trains at all.")] = True
    min_samples: Annotated[
        int, option("Labelled samples below which the device declines to train.", ge=1, le=10**9)
    ] = 1
    validation_share: Annotated[
        float, option("Share of labelled samples that is held out to evaluate on.", ge=0.0, le=0.9)
    ] = 0.2
    max_epochs: Annotated[int, option("Most passes over the samples in one round.", ge=1, le=100)] = 20
    max_steps: Annotated[int, option("Most optimizer steps in one round.", ge=1, le=100_000)] = 2000
    max_batch_size: Annotated[int, option("Largest batch, in samples.", ge=1, le=4096)] = 256
    max_learning_rate: Annotated[float, option("Largest learning rate.", gt=0.0, le=10.0)] = 1.0
    max_clipping_norm: Annotated[
        float, option("Largest L2 norm that an update may have.", gt=0.0, le=1e9)
    ] = 1000.0
    masked_only: Annotated[
        bool, option("Whether this device declines to send an update that is not under masks.")
    ] = False
    min_masked: Annotated[
        int, option("Fewest devices of a sum under masks that this one takes part in.", ge=3, le=16_384)
    ] = 3
    helper_key: Annotated[
        str,
        option(
            "Public key (hex) of the helper that unmasks sums, from who runs it; with masked_only, rounds without this"
            " helper are declined. Empty: the helper that the fleet's offline key names.",
            pattern=r"^([0-9a-f]{64}|[0-9a-f]{2432})?\Z",
        ),
    ] = ""
    max_examples: Annotated[int, option("Newest samples that one round trains on.", ge=1, le=10**7)] = 4096
    max_head_bytes: Annotated[
        int, option("Largest checkpoint that the device gathers for a round.", ge=1024, le=256 * 2**20)
    ] = 64 * 2**20

    def policy(self, fleet_cap: int) -> TrainPolicy:
        """The bounds for `learning.bounded`; `fleet_cap` is the most examples that the fleet counts."""
        return TrainPolicy(
            max_epochs=self.max_epochs,
            max_steps=self.max_steps,
            max_batch_size=self.max_batch_size,
            max_learning_rate=self.max_learning_rate,
            max_clipping_norm=self.max_clipping_norm,
            max_examples=min(self.max_examples, fleet_cap),
        )


class StorageSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage]`"""

    database_bytes: Annotated[int, option("Cap of agent.db.", ge=2**20, le=2**40)] = 256 * 2**20
    sample_bytes: Annotated[
        int, option("Cap of stored windows; the oldest go first.", ge=2**16, le=2**40)
    ] = 64 * 2**20
    outbox_bytes: Annotated[int, option("Cap of updates that wait for a receipt.", ge=2**16, le=2**40)] = (
        64 * 2**20
    )
    retention_days: Annotated[
        float, option("Age in days at which a stored window is deleted.", gt=0.0, le=36_500.0)
    ] = 30.0
    precision: Annotated[Literal["float32", "float16"], option("How windows are kept on disk.")] = "float32"


class ReleaseSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[release]`"""

    check_seconds: Annotated[
        float, option("Seconds between release checks without an announcement.", ge=1.0, le=2_592_000.0)
    ] = 21_600.0
    retry_cap_seconds: Annotated[
        float,
        option(
            "A wait before a failed check is made again is drawn from nothing to 15 seconds, doubled each time up to"
            " this.",
            ge=1.0,
            le=86_400.0,
        ),
    ] = 3600.0
    spread_seconds: Annotated[
        float,
        option("Seconds over which a fleet spreads its downloads of a new release.", ge=0.0, le=86_400.0),
    ] = 1.0
    probation_seconds: Annotated[
        float, option("Seconds that a new release is watched before it is trusted.", ge=0.0, le=2_592_000.0)
    ] = 60.0
    watch_windows: Annotated[
        int,
        option(
            "Windows that a new release and the one before must both have answered before the watch judges.",
            ge=1,
            le=512,
        ),
    ] = 16
    watch_slowdown: Annotated[
        float, option("Times slower than the one before at which a new release goes back.", gt=1.0, le=1e6)
    ] = 4.0
    watch_disagreement: Annotated[
        float,
        option(
            "Share of the windows that the release before was sure of (0.8) on which a new one may differ.",
            ge=0.0,
            le=1.0,
        ),
    ] = 0.5
    watch_shift: Annotated[
        float,
        option(
            "How far the distribution of its answers may move on those windows (total variation).",
            ge=0.0,
            le=1.0,
        ),
    ] = 0.4
    watch_confidence_drop: Annotated[
        float, option("How much its mean confidence may fall on those windows.", ge=0.0, le=1.0)
    ] = 0.4
    selftest_memory_bytes: Annotated[
        int, option("Private memory that a model's self-test may use.", ge=2**26, le=2**40)
    ] = 2**30
    selftest_seconds: Annotated[
        float, option("Wall time that a model's self-test may take.", ge=1.0, le=3600.0)
    ] = 120.0


class ReportSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[report]`"""

    telemetry_seconds: Annotated[
        float,
        option(
            "Seconds between heartbeats; the aggregator's broker.silent_seconds should be six times this.",
            ge=1.0,
            le=86_400.0,
        ),
    ] = 60.0
    inference_seconds: Annotated[
        float, option("Seconds between inference statistics.", ge=1.0, le=86_400.0)
    ] = 300.0


class NetworkSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[network]`"""

    keepalive_seconds: Annotated[
        int,
        option(
            "Longest silence towards the broker, in seconds; 0: 30, and on a metered link the shortest that leaves half"
            " of the budget: 86,400 × 260 bytes / (budget of a day / 2 − heartbeats, reports and checks), at most nine"
            " tenths of link.nat_seconds.",
            ge=0,
            le=65_535,
        ),
    ] = 0
    retry_first_seconds: Annotated[
        float,
        option(
            "A wait before coming back to the broker is drawn from nothing to this, and to twice as much each time.",
            ge=0.01,
            le=3600.0,
        ),
    ] = 0.5
    retry_cap_seconds: Annotated[
        float,
        option(
            "What that is drawn from at most, in seconds; between repetitions of an update and of a request for chunks,"
            " too.",
            ge=0.01,
            le=86_400.0,
        ),
    ] = 120.0
    hint_cap_seconds: Annotated[
        float,
        option(
            "Longest wait that a broker or server may ask for, and longest time that the aggregator may spread its"
            " fleet over.",
            ge=0.0,
            le=86_400.0,
        ),
    ] = 900.0
    receipt_seconds: Annotated[
        float, option("Seconds without a receipt after which an update is sent again.", ge=0.1, le=86_400.0)
    ] = 10.0
    ask_seconds: Annotated[
        float, option("Seconds of silence after which missing chunks are asked for.", ge=0.1, le=3600.0)
    ] = 2.0
    late_seconds: Annotated[
        float,
        option(
            "Seconds after a round's deadline in which its update is still offered.", ge=0.0, le=2_592_000.0
        ),
    ] = 600.0


class LinkSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[link]`: a link that is paid by bytes, or that may be used at some hours only (docs/how-to/links.md)."""

    metered: Annotated[
        bool,
        option(
            "Whether the link is paid by bytes. When its budget is spent, updates, downloads and reports wait;"
            " heartbeats, receipts, keys that come or go and rollbacks pass."
        ),
    ] = False
    bytes_per_day: Annotated[
        int,
        option(
            "Budget of a day, both directions, headers of TLS, TCP and IP included; 0 for none.",
            ge=0,
            le=2**50,
        ),
    ] = 0
    bytes_per_month: Annotated[int, option("Budget of a month, alike; 0 for none.", ge=0, le=2**50)] = 0
    month_begins: Annotated[
        int, option("Day of the month on which a month of the budget begins.", ge=1, le=28)
    ] = 1
    windows: Annotated[
        list[Annotated[str, Meta(max_length=16)]],
        option(
            'Hours of the day in which the link may be used for more than what always passes, such as ["02:00-05:00",'
            ' "22:30-00:15"]; none: at any time.',
            max_length=16,
        ),
    ] = []
    timezone: Annotated[
        str,
        option(
            'Whose days and hours those are: "local" (the machine\'s), "UTC", or a name such as "Europe/Berlin".',
            min_length=1,
            max_length=64,
        ),
    ] = "local"
    nat_seconds: Annotated[
        int,
        option(
            "Silence after which the network forgets a connection, in seconds; the keepalive stays a tenth below.",
            ge=34,
            le=7200,
        ),
    ] = 300


class HealthSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[health]`: when something is wrong, and what the agent does about it by itself."""

    check_seconds: Annotated[float, option("Seconds between two looks.", ge=1.0, le=86_400.0)] = 60.0
    remedies: Annotated[
        Mode,
        option(
            "What is done about a finding: on (reconnect, trim, roll back, pause training, renew), dry_run (a line in"
            " the log says what would be done), off."
        ),
    ] = "on"
    remedy_seconds: Annotated[
        float,
        option(
            "Least seconds between two of a remedy; it doubles while it does not help.", ge=1.0, le=86_400.0
        ),
    ] = 600.0
    min_free_bytes: Annotated[
        int, option("Free disk space below which it warns; below an eighth it fails.", ge=0, le=2**50)
    ] = 64 * 2**20
    max_celsius: Annotated[
        float, option("Temperature, in degrees Celsius, at which training is paused.", ge=0.0, le=500.0)
    ] = 85.0
    away_seconds: Annotated[
        float, option("Seconds without the broker that are a failure.", ge=1.0, le=31_622_400.0)
    ] = 3600.0
    max_owed: Annotated[int, option("Updates without a receipt above which it warns.", ge=1, le=10**6)] = 64


class MetricsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[metrics]`: for Prometheus. `shoal-edge status --json` shows the same numbers without either of them."""

    file: Annotated[
        str,
        option(
            "Text file for node_exporter's textfile collector, its name ending in .prom, relative to the state folder;"
            " empty for none.",
            max_length=1024,
        ),
    ] = ""
    listen: Annotated[
        str,
        option(
            'Where GET /metrics, /healthz and /readyz answer, such as "127.0.0.1:9465": plain HTTP without a password;'
            " empty for nowhere.",
            max_length=260,
        ),
    ] = ""


class EdgeSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one agent."""

    inference: InferenceSettings = field(default_factory=InferenceSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    release: ReleaseSettings = field(default_factory=ReleaseSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    link: LinkSettings = field(default_factory=LinkSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    log: LogSettings = field(default_factory=LogSettings)

    def backoff(self) -> Backoff:
        """Between attempts to reach the broker."""
        network = self.network
        return Backoff(network.retry_first_seconds, network.retry_cap_seconds, network.hint_cap_seconds)

    def timing(self) -> Timing:
        """The waits of the state machine."""
        return Timing(
            ask_after=self.network.ask_seconds,
            ask_backoff=Backoff(self.network.ask_seconds, min(30.0, self.network.retry_cap_seconds)),
            receipt_timeout=self.network.receipt_seconds,
            receipt_backoff=Backoff(self.network.receipt_seconds, self.network.retry_cap_seconds),
            check_backoff=Backoff(15.0, self.release.retry_cap_seconds, self.network.hint_cap_seconds),
            keep_after_deadline=self.network.late_seconds,
            check_every=self.release.check_seconds,
            announcement_spread=self.release.spread_seconds,
            probation=self.release.probation_seconds,
            telemetry_every=self.report.telemetry_seconds,
            report_every=self.report.inference_seconds,
            health_every=self.health.check_seconds,
            link_every=LOOK_SECONDS if self.link.metered or self.link.windows else inf,
            watch_every=WATCH_SECONDS if self.health.remedies != "off" else self.health.check_seconds,
        )


def load_edge_settings(path: Path | None, environment: Mapping[str, str] | None) -> EdgeSettings:
    """Reads settings from a file and the environment.

    Raises:
        ConfigurationError: (operator) see `process.settings.load_settings`; or a link that cannot be.
    """
    settings = load_settings(EdgeSettings, path, environment, VARIABLE_PREFIX)
    plan_of(settings)
    return settings
