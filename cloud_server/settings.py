"""The settings of an aggregator: `settings.toml` of its state folder and `SHOAL_CLOUD_…` variables over it.

Law of the file: every option has a default, a unit, a bound and one sentence; secrets are never here. Nothing
of torch or flwr is imported, so a list of devices does not wait for them. Source: docs/reference.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field, structs

from cloud_server.clock_evidence import ClockLimits
from cloud_server.privacy.plan import PrivacyPlan
from process.health import Mode
from process.options import option
from process.settings import LogSettings, load_settings
from wire.errors import ConfigurationError
from wire.messages import CodecName, TrainConfig

VARIABLE_PREFIX = "SHOAL_CLOUD_"


_ID = r"^[A-Za-z0-9_-]{1,64}\Z"
_DATE = r"^([0-9]{4}-[0-9]{2}-[0-9]{2})?\Z"
_DEVICE = r"^(auto|cpu|cuda(:[0-9]{1,3})?)\Z"
_Port = Annotated[int, Meta(ge=0, le=65_535)]


class ListenSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[listen]`: the two HTTPS ports."""

    host: Annotated[str, option("Address to listen on.", min_length=1, max_length=253)] = "127.0.0.1"
    public_port: Annotated[
        _Port, option("Port of enrolment (server certificate only); 0 takes a free one.")
    ] = 8443
    device_port: Annotated[_Port, option("Port of enrolled devices (mutual TLS); 0 takes a free one.")] = 8444
    advertise: Annotated[
        str, option("Host name or address that devices use; empty for the address above.", max_length=253)
    ] = ""
    tls_name: Annotated[
        str, option("Name in the server's certificate that devices check.", min_length=1, max_length=253)
    ] = "shoal-cloud"


class BrokerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[broker]`"""

    kind: Annotated[
        Literal["embedded", "mosquitto", "auto", "external"],
        option("Which broker is started beside the aggregator; external for one that runs already."),
    ] = "auto"
    host: Annotated[str, option("Address of the broker.", min_length=1, max_length=253)] = "127.0.0.1"
    port: Annotated[
        _Port, option("Port of the broker; 0 takes a free one for a broker that is started here.")
    ] = 1883
    tls: Annotated[bool, option("Mutual TLS to the broker (mosquitto and external).")] = False
    slot_bytes: Annotated[
        int, option("Largest sealed update of a device, in bytes.", ge=1024, le=256 * 2**20)
    ] = 64 * 2**20
    silent_seconds: Annotated[
        float,
        option(
            "Silence after which a device is not asked before it speaks again, in seconds; six heartbeats of the"
            " fleet (report.telemetry_seconds) survive the loss of two.",
            ge=1.0,
            le=2_592_000.0,
        ),
    ] = 360.0


class StorageSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[storage]`"""

    database: Annotated[
        str, option("Database URL; empty for SQLite in the state folder.", max_length=1024)
    ] = ""
    artefacts: Annotated[
        str,
        option(
            "Artefact URL (file:///folder, s3://bucket/prefix); empty for the state folder.", max_length=1024
        ),
    ] = ""


class PaceSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[pace]`: what the fleet is asked to keep to when all of it begins at once (docs/how-to/links.md)."""

    connections_per_second: Annotated[
        float,
        option(
            "Devices that may come back to the broker in a second; a fleet of N spreads over N / this, at most an hour;"
            " 0 asks for nothing.",
            ge=0.0,
            le=1e6,
        ),
    ] = 50.0
    downloads_per_second: Annotated[
        float, option("Devices that may begin to fetch a release in a second, alike.", ge=0.0, le=1e6)
    ] = 20.0


class EnrolmentSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[enrolment]`"""

    ring: Annotated[str, option("Ring of a device that is let in.", pattern=_ID)] = "stable"
    max_examples: Annotated[
        int, option("Most examples that one update of a device may count for.", ge=1, le=2**31)
    ] = 100_000
    token_hours: Annotated[float, option("Life of a token, in hours.", gt=0.0, le=8784.0)] = 24.0
    grace_days: Annotated[
        float,
        option(
            "Days after the end of its certificate in which a device that was away renews by its update key;"
            " 0 for never.",
            ge=0.0,
            le=3660.0,
        ),
    ] = 90.0
    address_per_minute: Annotated[
        int,
        option(
            "Requests a minute to the port without certificates, from one address (IPv6: one /64); a gateway or"
            " a proxy in between is one address.",
            ge=1,
            le=1_000_000,
        ),
    ] = 60
    per_minute: Annotated[
        int, option("Requests a minute to that port, from all addresses together.", ge=1, le=1_000_000)
    ] = 1200
    min_agent_version: Annotated[
        str,
        option(
            'Oldest agent that is asked for rounds, such as "0.2.0"; older ones answer inferences, get releases and'
            " stand in the log as agent_too_old; empty for any.",
            max_length=64,
        ),
    ] = ""


class TufSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[tuf]`: how long signatures hold, in days."""

    root_days: Annotated[float, option("Root.", gt=0.0, le=3660.0)] = 365.0
    targets_days: Annotated[float, option("Graphs, signed offline.", gt=0.0, le=3660.0)] = 365.0
    online_days: Annotated[float, option("Parameters, keys and rings.", gt=0.0, le=3660.0)] = 60.0
    snapshot_days: Annotated[float, option("Snapshot.", gt=0.0, le=3660.0)] = 14.0
    timestamp_days: Annotated[
        float, option("Timestamp; a device that is cut off notices after this.", gt=0.0, le=366.0)
    ] = 1.0


class RunSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[run]`: one training campaign."""

    name: Annotated[str, option("Id of the campaign.", pattern=_ID)] = "main"
    model: Annotated[
        str,
        option("The model it trains, by name or graphs hash; empty for the newest import.", max_length=64),
    ] = ""
    strategy: Annotated[
        str, option("Strategy, by its class name: Flower's, or a robust rule.", min_length=1, max_length=128)
    ] = "ClippedMean"
    parameters: Annotated[dict[str, Any], option("Parameters of the strategy's constructor.")] = {}
    serverapp: Annotated[
        str, option("module:app of a stock Flower ServerApp that drives the rounds instead.", max_length=256)
    ] = ""
    seed: Annotated[int, option("Seed of cohorts and orders; 0 draws one.", ge=0, le=2**63 - 1)] = 0
    rounds: Annotated[
        int, option("Rounds that move the head before the campaign ends; 0 for no end.", ge=0, le=10**9)
    ] = 0
    quorum: Annotated[int, option("Fewest devices that open and close a round.", ge=1, le=10**6)] = 2
    goal: Annotated[
        int, option("Updates that close a round at once; 0 for all of the cohort.", ge=0, le=10**6)
    ] = 0
    mode: Annotated[
        Literal["sync", "buffered"],
        option(
            "Whether a round folds updates of its own base only (sync), or the first `goal` updates that come, whatever"
            " heads they were trained on (buffered)."
        ),
    ] = "sync"
    max_staleness: Annotated[
        int,
        option(
            "Buffered: heads that may have come after the one that an update was trained on; a staler one is refused.",
            ge=0,
            le=1000,
        ),
    ] = 10
    staleness_exponent: Annotated[
        float,
        option(
            "Buffered: (1 + staleness) to minus this is how much of a stale update's step counts; 0 for all of it.",
            ge=0.0,
            le=10.0,
        ),
    ] = 0.5
    deadline_seconds: Annotated[
        float, option("Longest wait for updates, in seconds.", gt=0.0, le=2_592_000.0)
    ] = 600.0
    evaluate_seconds: Annotated[
        float, option("Longest wait for evaluations, in seconds.", gt=0.0, le=2_592_000.0)
    ] = 120.0
    evaluate_every: Annotated[
        int, option("Evaluate and decide on a release after this many rounds; 0 for never.", ge=0, le=10**6)
    ] = 1
    pause_seconds: Annotated[float, option("Rest between rounds, in seconds.", ge=0.0, le=2_592_000.0)] = 0.0
    paused: Annotated[bool, option("Begin paused: no round opens before `shoal-cloud round resume`.")] = False
    max_head_change: Annotated[
        float,
        option("L2 distance of a new head from its base above which the round is rejected.", gt=0.0, le=1e12),
    ] = 1e6
    max_holdout_drop: Annotated[
        float,
        option(
            "How much worse than its base a new head may be on the operator's held-out data (gate.holdout), in the"
            " metric's unit, before the round is rejected.",
            ge=0.0,
            le=1e9,
        ),
    ] = 0.5


class SecureSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[secure]`: who sees single updates (docs/how-to/secure-aggregation.md)."""

    policy: Annotated[
        Literal["plain", "pairwise", "two_server"],
        option(
            "Whether the aggregator reads each update (plain) or their sum only: by masks that devices agree on"
            " (pairwise), or that a helper of another party takes away (two_server). Rounds under masks have at least 3"
            " devices, which weigh the same, and no screening of single updates."
        ),
    ] = "plain"
    dropout: Annotated[
        float,
        option("Pairwise: share of a cohort that may vanish without failing the round.", ge=0.0, lt=0.5),
    ] = 0.2
    colluding: Annotated[
        float,
        option("Pairwise: share of a cohort that may tell the aggregator all they know.", ge=0.0, lt=0.5),
    ] = 0.1
    wait_seconds: Annotated[
        float,
        option(
            "Longest wait for each step of a round under masks beside its updates, and for the helper, in seconds.",
            ge=1.0,
            le=86_400.0,
        ),
    ] = 60.0
    helper_url: Annotated[
        str,
        option("Two servers: where the helper answers, such as https://helper.example:8446.", max_length=512),
    ] = ""
    helper_folder: Annotated[
        str,
        option(
            "Two servers: helper.json, ca.pem and token, from who runs the helper; relative to the state folder.",
            max_length=1024,
        ),
    ] = "helper"


class TrainSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[train]`: what devices are asked to do; each bounds it by its own policy."""

    optimizer: Annotated[Literal["sgd", "adam"], option("Optimizer on the device.")] = "sgd"
    epochs: Annotated[int, option("Passes over a device's samples per round.", ge=1, le=100)] = 1
    batch_size: Annotated[int, option("Samples per step.", ge=1, le=4096)] = 16
    max_steps: Annotated[int, option("Most steps per round.", ge=1, le=100_000)] = 1000
    learning_rate: Annotated[float, option("Learning rate.", gt=0.0, le=10.0)] = 0.05
    momentum: Annotated[float, option("Momentum of SGD.", ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, option("Weight decay.", ge=0.0, le=1.0)] = 0.0
    proximal_mu: Annotated[float, option("FedProx's pull towards the head.", ge=0.0, le=100.0)] = 0.0
    clipping_norm: Annotated[float, option("Largest L2 norm of an update.", gt=0.0, le=1e9)] = 10.0
    codec: Annotated[CodecName, option("How an update is compressed.")] = "dithered"

    def config(self) -> TrainConfig:
        """What an invitation carries."""
        return TrainConfig(**structs.asdict(self))


class ScreeningSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[screening]`: what is done about updates that are too long, broken or hostile."""

    norm_factor: Annotated[
        float,
        option(
            "An update longer (L2 norm) than so many times the running median of the last rounds is clipped to that;"
            " 0: only train.clipping_norm bounds it. Off under differential privacy, whose clip is fixed.",
            ge=0.0,
            le=1e6,
        ),
    ] = 3.0
    strike_limit: Annotated[
        int, option("Refused replies of broken content that put a device into quarantine.", ge=1, le=10**6)
    ] = 5
    clean_rounds: Annotated[
        int, option("Sound updates of a device that wear off one of its strikes.", ge=1, le=10**6)
    ] = 10
    probation_hours: Annotated[
        float,
        option(
            "Hours after which a device that its strikes quarantined is let back, one strike below the limit; 0: only"
            " `shoal-cloud device approve` lets it back.",
            ge=0.0,
            le=8784.0,
        ),
    ] = 24.0


class GateSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[gate]`: when a candidate becomes a release."""

    min_gain: Annotated[
        float,
        option(
            "Least improvement of the task's metric over the present release; 0 asks for some.",
            ge=0.0,
            le=1e9,
        ),
    ] = 0.0
    max_operator_drop: Annotated[
        float, option("How much worse it may be on the operator's own held-out data.", ge=0.0, le=1e9)
    ] = 0.02
    max_bytes: Annotated[int, option("Largest int8 file, in bytes; 0 for no limit.", ge=0, le=2**40)] = 0
    min_examples: Annotated[
        int, option("Fewest examples behind the devices' metric for it to count.", ge=0, le=10**12)
    ] = 1
    holdout: Annotated[
        str,
        option(
            "Operator's held-out data: an .npz with x and y, relative to the state folder; empty for none.",
            max_length=1024,
        ),
    ] = ""


class PrivacySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[privacy]`: differential privacy of the devices' data (docs/how-to/privacy.md)."""

    mode: Annotated[
        Literal["none", "central", "distributed"],
        option(
            "central: devices trust the aggregator with their updates, and it adds noise to their sum; distributed:"
            " devices add it themselves, under masks (secure.policy)."
        ),
    ] = "none"
    clipping_norm: Annotated[
        float, option("Largest L2 norm of an update; over train.clipping_norm.", ge=1e-9, le=1e9)
    ] = 1.0
    noise_multiplier: Annotated[
        float, option("Standard deviation of the noise on the sum, in clipping norms.", ge=0.01, le=1000.0)
    ] = 1.0
    sampling_rate: Annotated[
        float,
        option("Probability with which each device that is present is asked in a round.", ge=1e-9, le=1.0),
    ] = 0.1
    epsilon: Annotated[
        float,
        option(
            "What all rounds of the fleet may spend; one that would cross it is not opened.", ge=1e-6, le=1e6
        ),
    ] = 8.0
    delta: Annotated[
        float,
        option(
            "Probability with which epsilon may not hold; far below 1 over the devices.", ge=1e-15, le=0.1
        ),
    ] = 1e-5

    def plan(self) -> PrivacyPlan | None:
        """What a private run does; None for a run without differential privacy."""
        if self.mode == "none":
            return None
        return PrivacyPlan(**structs.asdict(self))


class RefineSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[refine]`: a little training on the operator's own data after every fold."""

    epochs: Annotated[int, option("Passes over the operator's data; 0 for no refinement.", ge=0, le=1000)] = 0
    data: Annotated[
        str,
        option(
            "Samples: an .npz with x and y, relative to the state folder; FLTrust trains on them too.",
            max_length=1024,
        ),
    ] = "refine.npz"
    model: Annotated[
        str,
        option(
            "module:function that makes the torch module; empty for the zoo model of the run's name.",
            max_length=256,
        ),
    ] = ""
    batch_size: Annotated[int, option("Samples per step.", ge=1, le=65_536)] = 64
    learning_rate: Annotated[float, option("Learning rate of SGD.", gt=0.0, le=10.0)] = 0.01
    momentum: Annotated[float, option("Momentum of SGD.", ge=0.0, lt=1.0)] = 0.9
    max_change: Annotated[
        float, option("Largest L2 norm of the change of all parameters.", gt=0.0, le=1e9)
    ] = 1.0
    mixed: Annotated[bool, option("bf16 mixed precision.")] = True


class ComputeSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[compute]`"""

    device: Annotated[
        str,
        option("Torch device of aggregation and refinement: auto, cpu, cuda or cuda:N.", pattern=_DEVICE),
    ] = "auto"


class HealthSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[health]`: when something is wrong, and what the service does about it by itself."""

    check_seconds: Annotated[float, option("Seconds between two looks.", ge=1.0, le=86_400.0)] = 60.0
    remedies: Annotated[
        Mode,
        option(
            "What is done about a finding: on (reconnect, trim, pause training, renew), dry_run (a line in the log says"
            " what would be done), off."
        ),
    ] = "on"
    remedy_seconds: Annotated[
        float,
        option(
            "Least seconds between two of a remedy; it doubles while it does not help.", ge=1.0, le=86_400.0
        ),
    ] = 600.0
    min_free_bytes: Annotated[
        int,
        option(
            "Free disk space below which it warns; below an eighth no further round is opened.",
            ge=0,
            le=2**50,
        ),
    ] = 512 * 2**20
    away_seconds: Annotated[
        float, option("Seconds without the broker that are a failure.", ge=1.0, le=31_622_400.0)
    ] = 300.0


class ClockSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[clock]`: when the machine's clock cannot be right. Nothing is signed or sent by such a clock: devices would
    believe it, and take what is signed by the right one for expired."""

    max_jump_days: Annotated[
        float,
        option("Longest time since something was last signed or written here, in days.", gt=0.0, le=36_600.0),
    ] = 366.0
    max_ahead_seconds: Annotated[
        float,
        option(
            "How far the clock may be ahead of the database's (PostgreSQL), and of the devices' where five of them or"
            " more agree, in seconds.",
            ge=10.0,
            le=31_536_000.0,
        ),
    ] = 300.0
    vouched_until: Annotated[
        str,
        option(
            "Date (UTC, such as 2027-01-31) up to the end of which an operator vouches for the clock, whatever speaks"
            " against it; empty for nobody.",
            pattern=_DATE,
        ),
    ] = ""

    def limits(self) -> ClockLimits:
        """As the judgement wants them.

        Raises:
            ConfigurationError: (operator) there is no such day.
        """
        vouched = 0.0
        if self.vouched_until:
            try:
                day = datetime.strptime(self.vouched_until, "%Y-%m-%d").replace(tzinfo=UTC)
            except ValueError as error:
                raise ConfigurationError(
                    f"clock.vouched_until: there is no day {self.vouched_until}",
                    hint="write it as 2027-01-31",
                ) from error
            vouched = (day + timedelta(days=1)).timestamp()
        return ClockLimits(
            max_jump_seconds=self.max_jump_days * 86_400.0,
            max_ahead_seconds=self.max_ahead_seconds,
            vouched_until=vouched,
        )


class MetricsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[metrics]`: for Prometheus. Off until it is asked for: a port is one more thing to guard, and two aggregators
    on one machine would want the same."""

    listen: Annotated[
        str,
        option(
            'Where GET /metrics, /healthz and /readyz answer, such as "127.0.0.1:9464": plain HTTP without a password,'
            " whoever reaches it may read it; empty for nowhere.",
            max_length=260,
        ),
    ] = ""


class StandbySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[standby]`: two aggregators on one PostgreSQL database, of which one waits."""

    lease_seconds: Annotated[
        float,
        option(
            "Silence of the aggregator that runs after which the one that waits takes over, in seconds.",
            ge=2.0,
            le=600.0,
        ),
    ] = 10.0


class AuditSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[audit]`: when the chain is signed, and who else keeps its heads."""

    head_entries: Annotated[
        int, option("Sign a head at the latest after so many entries.", ge=1, le=1_000_000)
    ] = 256
    head_seconds: Annotated[
        float,
        option("Sign a head at the latest when an entry is so old, in seconds.", ge=1.0, le=2_592_000.0),
    ] = 600.0
    witness: Annotated[
        str,
        option(
            "Who else is given every signed head: the path of a file (best on another machine) or an https:// address"
            " that takes a POST of JSON; empty for nobody.",
            max_length=1024,
        ),
    ] = ""


class OperatorSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[operators]`: the interface for people and their scripts."""

    listen: Annotated[
        str,
        option(
            'Where it answers over HTTPS, such as "127.0.0.1:8445"; every request needs a token; empty for nowhere.',
            max_length=260,
        ),
    ] = ""


class CloudSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one aggregator."""

    tenant: Annotated[str, option("Id of who runs the fleet.", pattern=_ID)] = "shoal"
    fleet: Annotated[str, option("Id of the fleet.", pattern=_ID)] = "fleet"
    listen: ListenSettings = field(default_factory=ListenSettings)
    broker: BrokerSettings = field(default_factory=BrokerSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    pace: PaceSettings = field(default_factory=PaceSettings)
    enrolment: EnrolmentSettings = field(default_factory=EnrolmentSettings)
    tuf: TufSettings = field(default_factory=TufSettings)
    run: RunSettings = field(default_factory=RunSettings)
    secure: SecureSettings = field(default_factory=SecureSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    screening: ScreeningSettings = field(default_factory=ScreeningSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    refine: RefineSettings = field(default_factory=RefineSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    clock: ClockSettings = field(default_factory=ClockSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    standby: StandbySettings = field(default_factory=StandbySettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    operators: OperatorSettings = field(default_factory=OperatorSettings)
    log: LogSettings = field(default_factory=LogSettings)


def load_cloud_settings(path: Path, environment: Mapping[str, str] | None) -> CloudSettings:
    """Reads settings from a file and the environment.

    Raises:
        ConfigurationError: (operator) see `process.settings.load_settings`.
    """
    return load_settings(CloudSettings, path, environment, VARIABLE_PREFIX)
