"""Puts one fleet's aggregator together from its parts: the same for the service and for a simulation.

Laws of the file: construction only, nothing runs here; what differs between the service and a simulation (transport,
clock, database, store, keys) is an argument. Source: docs/architecture.md, "The aggregator".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cloud_server.aggregate.fold import Fold, choose_device
from cloud_server.aggregator import SILENT_SECONDS, Aggregator
from cloud_server.artefacts import Artefacts
from cloud_server.audit.notary import Notary, list_key
from cloud_server.db.engine import Database
from cloud_server.downlink import Downlink
from cloud_server.flower.driver import StrategyDriver
from cloud_server.flower.strategies import (
    WRAPPERS,
    build_strategy,
    is_differentially_private,
    is_folded,
    needs_reference,
)
from cloud_server.keys import CloudKeys
from cloud_server.metrics import CloudMetrics
from cloud_server.pace import Hints, Pace
from cloud_server.privacy.budget import PrivateRun
from cloud_server.privacy.run import check_private, make_private
from cloud_server.refine.reference import reference_of
from cloud_server.refine.refinement import Refinery
from cloud_server.registry import Registry
from cloud_server.release.announcer import Announcer
from cloud_server.release.gate import GatePolicy
from cloud_server.release.held_out_bound import HeldOutBound
from cloud_server.release.publish import DEFAULT_RING, Publisher
from cloud_server.release.releaser import CalibratingFinisher, GatedReleaser, Holdout
from cloud_server.release.tuf_repository import TufRepository
from cloud_server.release.tuf_signing import TufExpiry
from cloud_server.rounds.buffered import check_buffered
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.state import RoundPolicy
from cloud_server.secure.opening import MaskingRules, check_strategy
from cloud_server.sender import Sender
from cloud_server.strikes import StrikePolicy
from models.bundle import Bundle
from models.candidate import CandidateMaker
from process.clock import Clock
from wire.messages import TrainConfig
from wire.topics import Topics
from wire.transport import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One run as the operator wants it.

    Attributes:
        strategy: a name of `cloud_server.flower.strategies`; `strategy_parameters` go to it as they are.
        fold_device: torch device of the fold: `auto`, `cpu`, `cuda`, `cuda:N`.
        max_head_change: a round whose head would move further (L2 norm) is rejected.
        norm_factor, strikes: see `rounds.plan.RunPlan`.
        masking: what masked rounds must survive; None: updates come without masks.
        max_holdout_drop: so is one whose head would be so much worse on the operator's held-out data.
        privacy: None for a run without differential privacy.
    """

    run: str = "main"
    strategy: str = "ClippedMean"
    strategy_parameters: Mapping[str, Any] = field(default_factory=dict)
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    train: TrainConfig = field(default_factory=TrainConfig)
    gate: GatePolicy = field(default_factory=GatePolicy)
    ring: str = DEFAULT_RING
    fold_device: str = "cpu"
    max_head_change: float = 1e6
    max_holdout_drop: float = 0.5
    privacy: PrivateRun | None = None
    masking: MaskingRules | None = None
    norm_factor: float = 3.0
    strikes: StrikePolicy = field(default_factory=StrikePolicy)


def with_masks(policy: RoundPolicy, masking: MaskingRules | None) -> RoundPolicy:
    """The policy of a run whose updates come under masks, or not."""
    if masking is None:
        return policy
    return replace(policy, secure=masking.policy, mask_seconds=masking.wait_seconds)


@dataclass(frozen=True, slots=True)
class Base:
    """What an aggregator stands on, whether or not a run is going on."""

    database: Database
    artefacts: Artefacts
    keys: CloudKeys
    clock: Clock
    registry: Registry
    repository: TufRepository
    fence: int
    notary: Notary | None = None

    @property
    def publisher(self) -> Publisher:
        """Signs releases under this process's fencing token."""
        notary = self.notary or Notary(self.database, lambda: self.keys.audit, self.clock)
        return Publisher(
            self.database, self.artefacts, self.repository, self.clock, fence=self.fence, notary=notary
        )


def open_base(
    database: Database,
    artefacts: Artefacts,
    keys: CloudKeys,
    clock: Clock,
    *,
    tenant: str,
    fleet: str,
    expiry: TufExpiry | None = None,
) -> Base:
    """Claims the database for this process and opens the signed repository, which is made where there is none."""
    database.migrate()
    fence = database.claim_writer()
    repository = TufRepository(artefacts, keys, clock, expiry=expiry)
    if not repository.is_initialised():
        repository.init(online_keys=keys.online_json(tenant=tenant, fleet=fleet))
        list_key(repository, keys.audit)
    registry = Registry(database, clock)
    return Base(database, artefacts, keys, clock, registry, repository, fence)


@dataclass(frozen=True, slots=True)
class Assembled:
    """An aggregator and the parts that its owner talks to. `hints`: what it asks its fleet to spread over now."""

    aggregator: Aggregator
    downlink: Downlink
    sender: Sender
    announcer: Announcer
    metrics: CloudMetrics
    hints: Callable[[], Hints]


def assemble(
    base: Base,
    transport: Transport,
    *,
    tenant: str,
    fleet: str,
    ring: str = DEFAULT_RING,
    chunk_bytes: int = 98_304,
    slot_bytes: int = 64 * 1024 * 1024,
    silent_seconds: float = SILENT_SECONDS,
    pace: Pace | None = None,
    may_send: Callable[[], None] = lambda: None,
) -> Assembled:
    """An aggregator over a transport; it only receives and announces until `Aggregator.begin` gives it a run.

    Args:
        ring: whose releases are announced.
        chunk_bytes: pieces of a broadcast; the broker must accept packets a little larger.
        slot_bytes: largest sealed update.
        silent_seconds: a device that said nothing for this long is not asked before it speaks again.
        pace: what the fleet is asked to keep to; None asks for nothing.
        may_send: see `Sender`.
    """
    topics = Topics(tenant, fleet)
    metrics = CloudMetrics()
    sender = Sender(transport, metrics.note_sent, may_send=may_send)
    downlink = Downlink(
        topics=topics,
        key=base.keys.order,
        epoch=base.fence,
        sender=sender,
        clock=base.clock,
        chunk_bytes=chunk_bytes,
    )

    def hints() -> Hints:
        return pace.hints(len(base.registry.signers())) if pace is not None else Hints()

    announcer = Announcer(
        base.publisher,
        downlink,
        base.clock,
        ring,
        least_agent=base.registry.min_agent_version,
        hints=hints,
    )
    aggregator = Aggregator(
        topics=topics,
        transport=transport,
        registry=base.registry,
        downlink=downlink,
        sender=sender,
        announcer=announcer,
        metrics=metrics,
        kem_keys=base.keys.kem,
        clock=base.clock,
        slot_bytes=slot_bytes,
        silent_seconds=silent_seconds,
        on_maintenance=base.repository.refresh,
    )
    return Assembled(aggregator, downlink, sender, announcer, metrics, hints)


def check_bases(config: RunConfig, strategy: Any, *, has_app: bool) -> None:
    """Raises `ConfigurationError` where updates of several bases do not go with the rest of the run."""
    check_buffered(
        with_masks(config.policy, config.masking),
        is_private=config.privacy is not None,
        is_adding_noise=is_differentially_private(strategy),
        has_app=has_app,
        needs_reference=needs_reference(strategy),
    )


def make_run_parts(
    base: Base,
    cloud: Assembled,
    bundle: Bundle,
    config: RunConfig,
    holdout: Holdout | None,
    refinery: Refinery | None = None,
    trusted: Refinery | None = None,
) -> tuple[RunPlan, RunPorts]:
    """What a runner is made of.

    Args:
        holdout: the operator's own labelled data, which the gate measures a candidate on.
        refinery: trains an aggregate on the operator's data before it becomes the head.
        trusted: trains FLTrust's reference on the operator's data.

    Raises:
        ConfigurationError: (operator) a strategy, parameter or device that does not exist, or FLTrust without data.
    """
    manifest, clock, steps = bundle.manifest, base.clock, cloud.metrics.step_seconds
    maker = CandidateMaker(bundle)
    device = choose_device(config.fold_device)
    chosen = build_strategy(config.strategy, config.strategy_parameters)
    if config.masking is not None:
        check_strategy(chosen)
    check_bases(config, chosen, has_app=False)
    strategy = StrategyDriver(
        chosen,
        manifest.params,
        buffers_size=manifest.buffers_size,
        make_fold=lambda size: Fold(size, device=device),
        device=device,
        reference=None if trusted is None else reference_of(trusted),
        timed=lambda: steps.timed(clock, step="fold"),
    )
    releaser = GatedReleaser(
        publisher=base.publisher,
        maker=maker,
        manifest=manifest,
        policy=config.gate,
        ring=config.ring,
        holdout=holdout,
        timed=lambda: steps.timed(clock, step="decide"),
    )
    ports = RunPorts(
        database=base.database,
        fence=base.fence,
        blobs=base.artefacts,
        nodes=base.registry,
        outbox=cloud.downlink,
        strategy=strategy,
        finisher=CalibratingFinisher(maker, refinery, lambda: steps.timed(clock, step="calibrate")),
        releaser=releaser,
        clock=clock,
        held_out=None if holdout is None else HeldOutBound(bundle, holdout),
        return_seconds=lambda: cloud.hints().reconnect_seconds,
    )
    plan = RunPlan(
        run=config.run,
        manifest=manifest,
        policy=with_masks(config.policy, config.masking),
        train=config.train,
        max_head_change=config.max_head_change,
        max_holdout_drop=config.max_holdout_drop,
        # The clip of differential privacy is fixed: one that follows from others' updates would tell of them.
        norm_factor=0.0 if config.strategy in WRAPPERS else config.norm_factor,
        strikes=config.strikes,
    )
    if config.privacy is None:
        return plan, ports
    check_private(
        plan.policy,
        config.privacy.plan.mode,
        buffers_size=manifest.buffers_size,
        is_folded=is_folded(chosen),
        has_holdout=holdout is not None,
        has_app=False,
    )
    return make_private(plan, ports, config.privacy)
