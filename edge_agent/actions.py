"""What the state machine asks its shell to do. Types only; source: docs/architecture.md, "The agent"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_agent.ports import JobKind
from edge_agent.rounds.masked_rounds import MaskMessage
from wire.messages import BlobRef, Evaluation, HeadPatch, Invitation, Order, Update

Verdict = Literal["stored", "duplicate", "refused"]


@dataclass(frozen=True, slots=True)
class PublishBirth:
    """Say (retained) that the device is here, and what it runs."""


@dataclass(frozen=True, slots=True)
class PublishJoin:
    """Answer an order."""

    order_id: bytes
    run: str
    round_number: int
    accepted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BeginMasking:
    """Draw the secrets for an order of a round under masks, and say the keys, if it wants any."""

    order: Order


@dataclass(frozen=True, slots=True)
class AnswerMasking:
    """Take a message of a masked round, and answer it."""

    body: MaskMessage


@dataclass(frozen=True, slots=True)
class MaskUpdate:
    """Mask the update of an order, if all that it takes is here; `UpdateMasked` follows."""

    order_id: bytes


@dataclass(frozen=True, slots=True)
class LeaveMasking:
    """Forget the secrets of a masked round."""

    order_id: bytes


@dataclass(frozen=True, slots=True)
class PublishTelemetry:
    """Heartbeat and counters."""


@dataclass(frozen=True, slots=True)
class PublishReport:
    """Inference statistics since the last report."""


@dataclass(frozen=True, slots=True)
class RememberOrder:
    """Write down that this order was accepted."""

    order: Order


@dataclass(frozen=True, slots=True)
class GatherHead:
    """Make room for the chunks of a head, or of the patch that leads to it."""

    head: BlobRef
    patch: HeadPatch | None = None


@dataclass(frozen=True, slots=True)
class DropHead:
    """Forget a head, complete or not."""

    sha256: bytes


@dataclass(frozen=True, slots=True)
class AskMissing:
    """Send the bitmap of the chunks of a head that are missing."""

    sha256: bytes


@dataclass(frozen=True, slots=True)
class StartJob:
    """Give a job to the worker; order and invitation are None for a release check."""

    kind: JobKind
    order: Order | None = None
    invitation: Invitation | None = None


@dataclass(frozen=True, slots=True)
class StoreUpdate:
    """Put an update into the outbox, on disk, before anything else."""

    body: Update | Evaluation
    deadline: float


@dataclass(frozen=True, slots=True)
class SendUpdate:
    """Seal (once) and publish an update of the outbox: all of it, or the parts that the cloud misses.

    `is_again`: some of it may be there already; of a large one the last chunk alone goes, and the cloud says which
    others it lacks (docs/protocol.md, clause 6.4).
    """

    update_id: bytes
    parts: tuple[int, ...] = ()
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class EndUpdate:
    """A receipt ended an update, if `transfer` is the hash of what was sent."""

    update_id: bytes
    verdict: Verdict
    transfer: bytes
    reason: str = ""
    cloud_row: int = 0
    durable: int = 0


@dataclass(frozen=True, slots=True)
class Sweep:
    """End what is past its deadline in the outbox, and drop samples past their retention."""


@dataclass(frozen=True, slots=True)
class LookAtLink:
    """Count what the link has cost, and decide whether it is open; `LinkLooked` follows when that changed."""


@dataclass(frozen=True, slots=True)
class SpreadReturns:
    """The fleet shall come back over so many seconds when it has lost the broker."""

    seconds: float


@dataclass(frozen=True, slots=True)
class CheckHealth:
    """Look at the device's health, and do what the remedies want."""


@dataclass(frozen=True, slots=True)
class ConfirmRelease:
    """The watch window ended well: the current slot becomes the last good one."""


@dataclass(frozen=True, slots=True)
class RollBack:
    """The current release serves badly: go back to the last good one."""

    reason: str


Action = (
    PublishBirth
    | PublishJoin
    | BeginMasking
    | AnswerMasking
    | MaskUpdate
    | LeaveMasking
    | PublishTelemetry
    | PublishReport
    | RememberOrder
    | GatherHead
    | DropHead
    | AskMissing
    | StartJob
    | StoreUpdate
    | SendUpdate
    | EndUpdate
    | Sweep
    | LookAtLink
    | SpreadReturns
    | CheckHealth
    | ConfirmRelease
    | RollBack
)
