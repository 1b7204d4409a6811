"""The critical paths, each played from a prepared folder to its end with one node in a process of its own.

*device*: order, training, outbox, sealing, sending, receipt, evaluation, and the swap to a new release, against a real
aggregator in the memory of this process. *cloud*: collecting, storing, receipts, fold, commit, evaluation, gate and
signing of an aggregator, against three real devices in the memory of this process.

Laws of the file: everything but the struck node is whole, so what is wrong at the end is the node's; the books are kept
from what the node told before it committed, from its disk after each end (read by connections of their own), and from
the other side. Source: docs/architecture.md, laws 2 and 3.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from edge_agent.enrolment.identity import Identity
from edge_agent.settings import EdgeSettings
from fleet.chaos.template import Template, make_split, make_template
from fleet.chaos.world import agent_settings, memory_folder
from fleet.real_chaos.device_life import DeviceFacts
from fleet.real_chaos.outcome import Books
from fleet.real_chaos.victim import Victim
from fleet.simulated_device import FLEET, TENANT
from fleet.virtual import START, VirtualTime
from models.bundle import Bundle
from models.data.federation import Split
from models.thirds import make_bundle
from wire.transport.memory import MemoryBroker

SEED: Final = 5
DEVICES: Final = 3
PATH_SECONDS: Final = 600.0
"""Virtual time within which a path that was struck once must be at its end."""


@dataclass
class Findings:
    """What one play has shown.

    Attributes:
        made: updates and evaluations that were in an outbox.
        complaints: all that must not be.
    """

    made: int = 0
    lost: int = 0
    doubled: int = 0
    altered: int = 0
    complaints: list[str] = field(default_factory=list)

    def wrong(self, what: str) -> None:
        self.complaints.append(what)

    def add(self, other: Findings, what: str) -> None:
        """Another play's, with a name before its complaints."""
        self.made += other.made
        self.lost += other.lost
        self.doubled += other.doubled
        self.altered += other.altered
        self.complaints += [f"{what}: {complaint}" for complaint in other.complaints]

    def books(self, **places: int) -> Books:
        """As a row of the table has it."""
        return Books(
            updates=self.made,
            lost=self.lost,
            doubled=self.doubled,
            altered=self.altered,
            places=places,
            complaints=tuple(self.complaints),
        )


class Path_(Protocol):
    """A path that can be played."""


class Others(Protocol):
    """The whole side of a play."""

    def settle(self) -> int:
        """Does what is due now; how much that was."""
        ...

    def next_moment(self) -> float:
        """When it wants to be asked again, in unix seconds."""
        ...


def play(
    time: VirtualTime, broker: MemoryBroker, others: Others, victim: Victim, is_over: Callable[[], bool]
) -> bool:
    """Lets a path run until it is over; False when it stands still or takes too long."""
    end = time.now() + PATH_SECONDS
    while time.now() < end:
        _settle(time, broker, others, victim)
        if is_over():
            return True
        moments = [others.next_moment()]
        if victim.is_up:
            moments.append(victim.wake)
        moments += [time.next_due() or end]
        due = broker.next_due()
        if due is not None:
            moments.append(due + START)
        time.advance_to(max(min(moments), time.now() + 1e-3))
    return False


def _settle(time: VirtualTime, broker: MemoryBroker, others: Others, victim: Victim) -> None:
    is_busy = True
    while is_busy:
        busy = broker.pump() + time.run_due() + others.settle()
        if victim.has_events or (victim.is_up and victim.wake <= time.now()):
            victim.turn()
            busy += 1
        is_busy = busy > 0


@dataclass(frozen=True)
class Workshop:
    """A fleet that is enrolled, and a folder for what plays make."""

    template: Template
    root: Path


@contextmanager
def workshop(bundle: Bundle | None = None) -> Iterator[Workshop]:
    """Prepares all plays of this process, in memory where there is such a place.

    Args:
        bundle: of `models.thirds`, where there is one; it takes seconds to make.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-paths-", dir=memory_folder()) as name:
        root = Path(name)
        template = make_template(bundle or make_bundle(root / "bundle"), root, DEVICES)
        yield Workshop(template, root)


def split_of(device: str) -> Split:
    return make_split(SEED, device)


def settings() -> EdgeSettings:
    """An agent's, with caps that a play can reach and waits that suit virtual time."""
    return agent_settings()


def device_facts(
    identity: Identity,
    *,
    is_taught: bool = True,
    owes: Sequence[bytes] = (),
    with_settings: EdgeSettings | None = None,
) -> dict[str, Any]:
    """What the life of a device is told.

    Args:
        is_taught: whether its folder has its samples already.
        owes: bodies of updates for its outbox.
    """
    split = split_of(identity.device)
    samples = [
        (window.tolist(), int(label), part)
        for x, y, part in ((split.train_x, split.train_y, "train"), (split.val_x, split.val_y, "val"))
        for window, label in zip(x, y, strict=True)
    ]
    facts = DeviceFacts(
        device=identity.device,
        tenant=TENANT,
        fleet=FLEET,
        key=identity.update_key.private_bytes(),
        tuf_root=identity.tuf_root,
        kem=identity.kem,
        orders=identity.orders,
        settings=msgspec.to_builtins(with_settings or settings()),
        window=split.test_x[0].tolist(),
        train=[] if is_taught else samples,
        owes=list(owes),
    )
    plain: dict[str, Any] = msgspec.to_builtins(facts, builtin_types=(bytes,))
    return plain
