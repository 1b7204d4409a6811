"""What one run is made of, what the service lends to it, and what a screen shows of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from cloud_server.db.engine import Database
from cloud_server.privacy.budget import Budget
from cloud_server.rounds.ports import Blobs, Finisher, HeldOut, NodeDirectory, Outbox, Releaser, Strategy
from cloud_server.rounds.state import Phase, RoundPolicy
from cloud_server.strikes import StrikePolicy
from process.clock import Clock
from wire.manifest import Manifest
from wire.messages import CodecName, TrainConfig
from wire.patch import DEFAULT_PATCH_CODEC


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What one run does.

    Attributes:
        run: its id.
        manifest: the model that it trains.
        policy: when rounds open, close and fail.
        train: how devices train; a strategy may change `proximal_mu` and `clipping_norm` per round.
        max_head_change: a round whose head lies further (L2 norm) from its base is rejected.
        max_holdout_drop: a round whose head is so much worse than its base on held-out data is rejected.
        norm_factor: an update longer (L2 norm) than so many times the running median of the rounds before is clipped
            to that; 0: only `train.clipping_norm` bounds it, as differential privacy wants it.
        strikes: what broken and hostile replies cost a device.
        is_private: of a reply only its update counts, as much as any other's: neither weight nor metrics are kept.
        patch_codec: how the step from head to head is coded; empty: heads move exactly and travel whole.
    """

    run: str
    manifest: Manifest
    policy: RoundPolicy
    train: TrainConfig
    max_head_change: float = 1e6
    max_holdout_drop: float = 0.5
    norm_factor: float = 3.0
    strikes: StrikePolicy = field(default_factory=StrikePolicy)
    is_private: bool = False
    patch_codec: CodecName | Literal[""] = DEFAULT_PATCH_CODEC

    @property
    def graphs_sha256(self) -> bytes:
        """The model's identity, 32 bytes."""
        return bytes.fromhex(self.manifest.graphs_sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPorts:
    """What the service lends to a run.

    Attributes:
        fence: the token of `Database.claim_writer`, or None where nobody else can write.
        held_out: None where the operator has no labelled data.
        return_seconds: over which the fleet is asked to spread its return now.
        budget: what private rounds are charged to; None for a run without differential privacy.
    """

    database: Database
    fence: int | None
    blobs: Blobs
    nodes: NodeDirectory
    outbox: Outbox
    strategy: Strategy
    finisher: Finisher
    releaser: Releaser
    clock: Clock
    held_out: HeldOut | None = None
    return_seconds: Callable[[], float] = lambda: 0.0
    budget: Budget | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run as it stands. `metrics` are those of the newest round that was folded."""

    run: str
    phase: Phase
    round_number: int
    moved: int
    failures: int
    cohort: int
    answered: int
    deadline: float
    head_sha256: bytes
    metrics: Mapping[str, float]
