"""Puts one fleet's aggregator together from its parts: the same for the service and for a simulation.

Laws of the file: construction only, nothing runs here; what differs between the service and a simulation (transport,
clock, database, store, keys) is an argument. Source: docs/architecture.md, "The aggregator".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloud_server.aggregate.fold import Fold, choose_device
from cloud_server.aggregator import SILENT_SECONDS, Aggregator
from cloud_server.artefacts import Artefacts
from cloud_server.db.engine import Database
from cloud_server.downlink import Downlink
from cloud_server.flower.driver import StrategyDriver
from cloud_server.flower.strategies import build_strategy
from cloud_server.keys import CloudKeys
from cloud_server.metrics import CloudMetrics
from cloud_server.refine.refinement import Refinery
from cloud_server.registry import Registry
from cloud_server.release.announcer import Announcer
from cloud_server.release.gate import GatePolicy
from cloud_server.release.publish import DEFAULT_RING, Publisher
from cloud_server.release.releaser import CalibratingFinisher, GatedReleaser, Holdout
from cloud_server.release.tuf_repository import TufRepository
from cloud_server.release.tuf_signing import TufExpiry
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.state import RoundPolicy
from cloud_server.sender import Sender
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
    """

    run: str = "main"
    strategy: str = "FedAvg"
    strategy_parameters: Mapping[str, Any] = field(default_factory=dict)
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    train: TrainConfig = field(default_factory=TrainConfig)
    gate: GatePolicy = field(default_factory=GatePolicy)
    ring: str = DEFAULT_RING
    fold_device: str = "cpu"
    max_head_change: float = 1e6


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

    @property
    def publisher(self) -> Publisher:
        """Signs releases under this process's fencing token."""
        return Publisher(self.database, self.artefacts, self.repository, self.clock, fence=self.fence)


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
    registry = Registry(database, clock)
    return Base(database, artefacts, keys, clock, registry, repository, fence)


@dataclass(frozen=True, slots=True)
class Assembled:
    """An aggregator and the parts that its owner talks to."""

    aggregator: Aggregator
    downlink: Downlink
    sender: Sender
    announcer: Announcer
    metrics: CloudMetrics


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
) -> Assembled:
    """An aggregator over a transport; it only receives and announces until `Aggregator.begin` gives it a run.

    Args:
        ring: whose releases are announced.
        chunk_bytes: pieces of a broadcast; the broker must accept packets a little larger.
        slot_bytes: largest sealed update.
        silent_seconds: a device that said nothing for this long is not asked before it speaks again.
    """
    topics = Topics(tenant, fleet)
    metrics = CloudMetrics()
    sender = Sender(transport, metrics.note_sent)
    downlink = Downlink(
        topics=topics,
        key=base.keys.order,
        epoch=base.fence,
        sender=sender,
        clock=base.clock,
        chunk_bytes=chunk_bytes,
    )
    announcer = Announcer(base.publisher, downlink, base.clock, ring)
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
    return Assembled(aggregator, downlink, sender, announcer, metrics)


def make_run_parts(
    base: Base,
    cloud: Assembled,
    bundle: Bundle,
    config: RunConfig,
    holdout: Holdout | None,
    refinery: Refinery | None = None,
) -> tuple[RunPlan, RunPorts]:
    """What a runner is made of.

    Args:
        holdout: the operator's own labelled data, which the gate measures a candidate on.
        refinery: trains an aggregate on the operator's data before it becomes the head.

    Raises:
        ConfigurationError: (operator) a strategy, parameter or device that does not exist.
    """
    manifest, clock, steps = bundle.manifest, base.clock, cloud.metrics.step_seconds
    maker = CandidateMaker(bundle)
    device = choose_device(config.fold_device)
    strategy = StrategyDriver(
        build_strategy(config.strategy, config.strategy_parameters),
        manifest.params,
        buffers_size=manifest.buffers_size,
        make_fold=lambda size: Fold(size, device=device),
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
    )
    plan = RunPlan(
        run=config.run,
        manifest=manifest,
        policy=config.policy,
        train=config.train,
        max_head_change=config.max_head_change,
    )
    return plan, ports
