"""What the round runner needs from the service around it, as small protocols.

Laws of the file: types only. Every call returns at once (what it starts may go on afterwards) and may come
again with the same arguments after a restart, so each must be idempotent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wire.checkpoint import Checkpoint
from wire.messages import BlobRef, Invitation, Order

Vector = NDArray[np.float32]
Scalar = bool | float | int | str | bytes


class NodeDirectory(Protocol):
    """Which devices there are: approval and presence, and Flower's 64-bit node id of each."""

    def present(self) -> Mapping[str, int]:
        """Device → node id, of the approved devices that are online now."""
        ...

    def node_id(self, device: str) -> int:
        """The node id of a device that was enrolled, present or not."""
        ...

    def max_examples(self, device: str) -> int:
        """The device's enrolled cap on `num_examples`; at least 1."""
        ...


class Outbox(Protocol):
    """What goes down to devices. The service signs, publishes, and serves what is asked for again."""

    def publish_blob(self, data: bytes, *, broadcast: bool = True) -> BlobRef:
        """Makes content available in chunks (`bl/`) and returns its reference; without `broadcast` a chunk
        leaves only when a device asks for it."""
        ...

    def send_invitation(self, invitation: Invitation) -> None:
        """Publishes `rd/now` (retained)."""
        ...

    def send_order(self, device: str, order: Order) -> None:
        """Sends `cm/{device}`. The same order may come again."""
        ...


class Blobs(Protocol):
    """Content-addressed bytes; `cloud_server.artefacts.Artefacts` is one."""

    def put_blob(self, data: bytes) -> str:
        """Keeps bytes durably; returns their SHA-256 (hex)."""
        ...

    def get_blob(self, sha256: str) -> bytes: ...

    def delete_blob(self, sha256: str) -> None: ...


class Finisher(Protocol):
    """Makes an aggregate a whole head: refinement on the operator's data where configured, and activation
    ranges. Both give the same for the same arguments."""

    def refine(self, params: Vector, buffers: Vector, seed: int) -> Vector:
        """The parameters that the head should have, float32 [P].

        Args:
            params: float32 [P], the aggregate.
            buffers: float32 [Q].
        """
        ...

    def finish(self, params: Vector, buffers: Vector, base: Checkpoint) -> Checkpoint:
        """The head of these parameters, as it is committed.

        Args:
            base: the round's base, whose ranges may be kept.
        """
        ...


class HeldOut(Protocol):
    """The operator's own labelled data, which no device has seen."""

    def loss_of(self, base: Checkpoint, head: Checkpoint) -> float:
        """How much worse the head is than its base, in the unit of the task's metric; negative where it is better.

        Raises:
            ModelError: an answer of the head is not finite.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A head that may be released.

    Attributes:
        metrics: what the cohort measured with the quantized head, weighted by `num_examples` (of all: under
            `num_examples`); empty when nobody answered.
        devices: how many devices measured it.
        measured: what each of them said, with its weight capped.
    """

    run: str
    round_number: int
    checkpoint: Checkpoint
    metrics: Mapping[str, float]
    devices: int
    measured: Sequence[Measured] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the gate said: a release version, or 0 and why it was held back. `metrics` join the round's."""

    release_version: int = 0
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


class Releaser(Protocol):
    """The gate and all that follows it."""

    def decide(self, candidate: Candidate) -> Decision:
        """Releases the candidate or holds it back. Asked twice for a round, it gives the first answer
        again."""
        ...


# ---- between the runner and Flower -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """A cohort, in the order in which it was drawn, and what the strategy wrote into its configuration."""

    node_ids: tuple[int, ...]
    config: Mapping[str, Scalar]


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """One screened update. `update` float32 [P] (local − global, clipped), `buffers` float32 [Q]; both may
    be written to: they were decoded for this reply alone."""

    node_id: int
    num_examples: int
    metrics: Mapping[str, float]
    update: Vector
    buffers: Vector
    norm: float


class Replies(Protocol):
    """The committed set in the canonical order of update ids. Iterates as often as wanted, decoding anew
    each time, so that memory does not grow with the cohort."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Reply]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """What a strategy made of a round: params float32 [P], buffers float32 [Q], and its metrics."""

    params: Vector
    buffers: Vector
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """One device's evaluation."""

    node_id: int
    num_examples: int
    metrics: Mapping[str, float]


class Strategy(Protocol):
    """An aggregation rule with its state; `cloud_server.flower.driver.StrategyDriver` wraps one of
    Flower's."""

    def plan_train(self, round_number: int, base: Checkpoint, node_ids: Iterable[int], seed: int) -> Plan:
        """Draws the cohort of a round.

        Raises:
            QuorumError: fewer nodes than the strategy wants.
        """
        ...

    def aggregate_train(self, round_number: int, base: Checkpoint, replies: Replies, seed: int) -> Aggregate:
        """Aggregates, and moves the strategy's own state on.

        Raises:
            RoundError: the strategy made nothing of these replies; its state is as it was.
        """
        ...

    def plan_evaluate(self, round_number: int, head: Checkpoint, node_ids: Iterable[int], seed: int) -> Plan:
        """Draws who evaluates; an empty plan is legal."""
        ...

    def aggregate_evaluate(self, round_number: int, measured: list[Measured]) -> Mapping[str, float]: ...

    def export_state(self) -> Mapping[str, bytes]:
        """What must survive a restart, by name (at most 64 characters)."""
        ...

    def import_state(self, state: Mapping[str, bytes]) -> None: ...
