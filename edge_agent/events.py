"""What can happen to a device: the events of its state machine. Types only; source: docs/architecture.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_agent.ports import JobKind
from edge_agent.rounds.masked_rounds import MaskMessage
from wire.messages import Evaluation, Invitation, Order, Update


@dataclass(frozen=True, slots=True)
class Started:
    """The agent came up.

    Attributes:
        release_version: of the current slot; 0 without a model.
        graphs_sha256: of the current slot; empty without a model.
        on_probation: the current slot was new when the agent went down.
        pending: (update_id, deadline in unix seconds) of every update without a receipt.
        is_link_open: updates, downloads and reports may go.
        interrupted: (order_id, run, round_number) of orders that were accepted and did not come to an update.
    """

    release_version: int
    graphs_sha256: bytes
    on_probation: bool
    pending: tuple[tuple[bytes, float], ...]
    interrupted: tuple[tuple[bytes, str, int], ...] = ()
    is_link_open: bool = True


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker accepted us."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection to the broker is gone, or an attempt failed; `is_distrust` when for a certificate."""

    is_distrust: bool = False


@dataclass(frozen=True, slots=True)
class InvitationArrived:
    """A verified `rd`; `must_ask` when its head is sent on need only, and nothing that leads to it is here."""

    invitation: Invitation
    must_ask: bool = False


@dataclass(frozen=True, slots=True)
class OrderArrived:
    """A verified `cm`.

    Attributes:
        refusal: why this device cannot do it, or empty.
        update_id: of the update that this order already led to, or empty.
        is_news: it speaks of what only the next release check can explain.
    """

    order: Order
    refusal: str = ""
    update_id: bytes = b""
    is_news: bool = False


@dataclass(frozen=True, slots=True)
class ChunkArrived:
    """A chunk of a head that was still missing."""

    sha256: bytes


@dataclass(frozen=True, slots=True)
class HeadReady:
    """A head is complete and its hash is right."""

    sha256: bytes


@dataclass(frozen=True, slots=True)
class JobDone:
    """A train or evaluate job gave its answer; `key` is the order's id."""

    key: bytes
    body: Update | Evaluation


@dataclass(frozen=True, slots=True)
class DraftDone:
    """A train job of a masked round gave its update, which waits for its masks; `key` is the order's id."""

    key: bytes
    steps: int


@dataclass(frozen=True, slots=True)
class MaskingHeard:
    """A verified message of a masked round."""

    body: MaskMessage


@dataclass(frozen=True, slots=True)
class UpdateMasked:
    """The update of an order is under its masks."""

    key: bytes
    body: Update


@dataclass(frozen=True, slots=True)
class MaskingFailed:
    """A masked round cannot go on for this device; `key` is the order's id."""

    key: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class JobFailed:
    """A job ended without an answer; `key` is the order's id, empty for a release check. `asked_seconds`: the server
    wants to be left alone for so long."""

    kind: JobKind
    key: bytes
    reason: str
    asked_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CheckWanted:
    """A release check is wanted soon, which also renews the certificate."""


@dataclass(frozen=True, slots=True)
class ReleaseInstalled:
    """A release check ended well. The version is the one before when there was nothing new; `keys_version` 0: nobody
    said; `stale` are updates that were sealed to a key which the cloud no longer lists."""

    release_version: int
    graphs_sha256: bytes
    keys_version: int = 0
    stale: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class ReceiptArrived:
    """A verified `ak`; `update_id` is already resolved from the transfer's hash."""

    update_id: bytes
    verdict: Literal["stored", "duplicate", "refused", "missing"]
    transfer: bytes
    reason: str = ""
    missing: tuple[int, ...] = ()
    cloud_row: int = 0
    durable: int = 0


@dataclass(frozen=True, slots=True)
class CloudRestored:
    """The cloud came back from a backup; `offered`: (update_id, deadline) of what it had acknowledged and lost."""

    offered: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True, slots=True)
class UpdateLost:
    """An update could not be kept (the disk is full) or was found damaged."""

    update_id: bytes


@dataclass(frozen=True, slots=True)
class AnnouncementArrived:
    """A verified `md`; `keys_version` 0: it does not say which keys count. `reconnect_seconds` and `spread_seconds` are
    bounded already."""

    release_version: int
    keys_version: int = 0
    reconnect_seconds: float = 0.0
    spread_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LinkLooked:
    """The link has opened or shut."""

    is_open: bool


@dataclass(frozen=True, slots=True)
class KeysUnknown:
    """A message downward was signed by a key that we do not know: the online keys may have changed."""


@dataclass(frozen=True, slots=True)
class ServedBadly:
    """The current release failed on requests that the one before could answer."""

    release_version: int
    reason: str


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The last good release serves again."""

    release_version: int
    graphs_sha256: bytes


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by."""


Event = (
    Started
    | Connected
    | Disconnected
    | InvitationArrived
    | OrderArrived
    | ChunkArrived
    | HeadReady
    | JobDone
    | DraftDone
    | MaskingHeard
    | UpdateMasked
    | MaskingFailed
    | JobFailed
    | ReleaseInstalled
    | ReceiptArrived
    | CloudRestored
    | UpdateLost
    | AnnouncementArrived
    | LinkLooked
    | KeysUnknown
    | CheckWanted
    | ServedBadly
    | RolledBack
    | Tick
)
