"""One light agent: a device's conversation with the cloud, without a model, a disk or a thread.

What is real is the wire: its identity, its voice (`edge_agent.uplink.speaker`: sealing, numbers, replay windows,
verification), its queue in front of the transport, its connection, and the outbox's rule (an update is kept until a
receipt names its very bytes, and is sent again after a reconnection or without an answer). What is not: it answers an
order with numbers that were made beforehand, evaluates nothing, and remembers in memory. Laws of the file: one thread,
the one of the loop; every update is in the ledger before anything of it is sent.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from edge_agent.enrolment.identity import Identity
from edge_agent.rounds.jobs import update_id_of
from edge_agent.uplink.outgoing import Outgoing
from edge_agent.uplink.speaker import DownBody, Speaker
from fleet.load.ledger import LedgerFile
from fleet.load.tally import Tally
from process.clock import Clock, SystemClock
from process.version import VERSION
from wire.backoff import Backoff
from wire.errors import ShoalError
from wire.messages import (
    CODEC_NAMES,
    Announcement,
    Birth,
    CodecName,
    Join,
    Order,
    Receipt,
    Telemetry,
    Update,
    encode_body,
)
from wire.primitives import random_bytes, sha256
from wire.replay import Window
from wire.transport import Connected, Disconnected, Published, Received, Transport, TransportEvent

WIRE_VERSIONS: Final = (1, 1)


class Later(Protocol):
    """Makes a call on the loop's thread after so many seconds; `SelectorLoop.call_later` is one."""

    def __call__(self, delay_seconds: float, task: Callable[[], None], /) -> object: ...


Install = Callable[["LightAgent", int], None]
"""Brings a release to an agent, which is told by `installed`; from the loop's thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """When a light agent speaks, in seconds; the defaults are those of a device.

    Attributes:
        heartbeat_seconds: between two heartbeats; a fifth more by chance.
        receipt_seconds: without a receipt after which an update is sent again.
        receipt_first, receipt_cap: of the back-off (`wire/backoff.py`) that comes on top.
        spread_seconds: over which a fleet spreads its downloads of a release.
    """

    heartbeat_seconds: float = 60.0
    receipt_seconds: float = 10.0
    receipt_first: float = 10.0
    receipt_cap: float = 300.0
    spread_seconds: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """An update without its ids: the encoded difference and what a device says beside it."""

    codec: CodecName
    params_size: int
    payload: bytes
    buffers: bytes
    num_examples: int
    metrics: dict[str, float]


@dataclass(slots=True)
class Owed:
    """An update in the outbox."""

    update_id: bytes
    round_number: int
    sealed: bytes
    transfer: bytes
    sends: int = 0


class LightAgent:
    """One device.

    Args:
        transport: not started yet.
        draft: what it answers a train order with.
        later: plans calls on the thread on which the transport delivers.
        install: see `Install`; None takes a release over as announced.
        cut: breaks its connection as a bad link does; called once, right after its first update was sent.
        on_online: called when it is connected, each time.
        spread: told over how long the aggregator asks its fleet to come back.
    """

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        *,
        draft: Draft,
        ledger: LedgerFile,
        tally: Tally,
        later: Later,
        rng: random.Random,
        habits: Habits | None = None,
        clock: Clock | None = None,
        install: Install | None = None,
        cut: Callable[[], None] | None = None,
        on_online: Callable[[], None] = lambda: None,
        spread: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.identity = identity
        self.release = 0
        self._transport = transport
        self._draft = draft
        self._ledger = ledger
        self._tally = tally
        self._later = later
        self._rng = rng
        self._habits = habits or Habits()
        self._backoff = Backoff(self._habits.receipt_first, self._habits.receipt_cap)
        self._clock = clock or SystemClock()
        self._install = install
        self._cut = cut
        self._on_online = on_online
        self._spread = spread
        self._speaker = Speaker(identity, sequence=_Numbers(), windows=_Windows(), clock=self._clock)
        self._outgoing = Outgoing(transport)
        self._boot_id = random_bytes(16)
        self._born = self._clock.monotonic()
        self._is_connected = self._has_heart = False
        self._max_packet_bytes = 0
        self._owed: dict[bytes, Owed] = {}
        self._answered: set[bytes] = set()
        self._announced = 0

    @property
    def owed(self) -> int:
        """Updates without a receipt."""
        return len(self._owed)

    def start(self) -> None:
        """Connects; everything follows from what arrives."""
        will = self._speaker.birth(self._birth("lost"))
        self._transport.start(self.handle, filters=self._speaker.filters, will=will)

    def stop(self) -> None:
        """Leaves politely."""
        self._transport.stop(self._speaker.birth(self._birth("offline")))

    def handle(self, event: TransportEvent) -> None:
        """Takes one event of the transport, on the loop's thread."""
        match event:
            case Connected():
                self._came(event)
            case Disconnected():
                self._went()
            case Received(packet):
                try:
                    if self._speaker.hear_chunk(packet) is None:
                        self._hear(self._speaker.hear(packet))
                except ShoalError as error:
                    self._tally.failed(type(error).__name__)
            case Published():
                if not event.accepted:
                    self._tally.failed("publish")
        self._outgoing.pump()

    def installed(self, version: int) -> None:
        """The release is here: the cloud is told."""
        self._tally.moved(self.release, version)
        self.release = version
        if self._is_connected:
            self._outgoing.say(self._speaker.birth(self._birth("online")))
            self._outgoing.pump()

    # ---- inside ------------------------------------------------------------------------------------------------

    def _came(self, event: Connected) -> None:
        self._is_connected, self._max_packet_bytes = True, event.max_packet_bytes
        self._tally.connects += 1
        self._tally.online += 1
        self._outgoing.say(self._speaker.birth(self._birth("online")))
        for owed in self._owed.values():
            self._upload(owed)
        if not self._has_heart:
            self._has_heart = True
            self._later(self._rng.random() * self._habits.heartbeat_seconds, self._beat)
        self._on_online()

    def _went(self) -> None:
        if self._is_connected:
            self._tally.disconnects += 1
            self._tally.online -= 1
        else:
            self._tally.attempts_failed += 1
        self._is_connected = False
        self._outgoing.connection_lost()

    def _hear(self, body: DownBody) -> None:
        match body:
            case Order():
                self._answer(body)
            case Receipt():
                self._settle(body)
            case Announcement():
                self._spread(body.reconnect_seconds)
                self._learn(body)

    def _learn(self, body: Announcement) -> None:
        if body.release_version not in (0, self._announced):
            self._announced = body.release_version
            wait = self._rng.random() * max(self._habits.spread_seconds, body.spread_seconds)
            self._later(wait, functools.partial(self._take_release, body.release_version))

    def _answer(self, order: Order) -> None:
        """A repeated order is answered again and made once: its update has the same id."""
        update_id = update_id_of(self.identity.device, order.order_id)
        is_train = order.kind == "train" and order.ring_terms is None
        reason = "" if is_train else "a light agent only trains"
        join = Join(order_id=order.order_id, accepted=is_train, reason=reason)
        packet = self._speaker.join(join, run=order.run, round_number=order.round_number)
        self._outgoing.say(packet, survives=True)
        if is_train and update_id not in self._answered:
            self._answered.add(update_id)
            self._make(order, update_id)

    def _make(self, order: Order, update_id: bytes) -> None:
        draft = self._draft
        body = encode_body(
            Update(
                update_id=update_id,
                order_id=order.order_id,
                run=order.run,
                round_number=order.round_number,
                base_sha256=order.head_sha256,
                num_examples=draft.num_examples,
                codec=draft.codec,
                params_size=draft.params_size,
                payload=draft.payload,
                buffers=draft.buffers,
                metrics=draft.metrics,
            )
        )
        self._ledger.made(self.identity.device, order.order_id, update_id, sha256(body))
        sealed = self._speaker.seal_update(
            Update.TYPE, body, run=order.run, round_number=order.round_number, base=order.head_sha256
        )
        owed = self._owed[update_id] = Owed(update_id, order.round_number, sealed, sha256(sealed))
        self._tally.made += 1
        if self._is_connected:
            self._upload(owed)
            cut, self._cut = self._cut, None
            if cut is not None:
                self._later(0.0, cut)

    def _upload(self, owed: Owed, parts: tuple[int, ...] = ()) -> None:
        packets = self._speaker.uploads(
            owed.sealed, owed.round_number, max_packet_bytes=self._max_packet_bytes, parts=parts
        )
        self._outgoing.upload(owed.update_id, packets)
        self._tally.uploads += 1
        self._tally.uploads_again += owed.sends > 0
        wait = self._habits.receipt_seconds + self._backoff.delay_seconds(owed.sends, self._rng)
        owed.sends += 1
        self._later(wait, functools.partial(self._remind, owed, owed.sends))

    def _remind(self, owed: Owed, sends: int) -> None:
        """Nobody answered since the send of this number."""
        if self._is_connected and owed.update_id in self._owed and owed.sends == sends:
            self._upload(owed)
            self._outgoing.pump()

    def _settle(self, receipt: Receipt) -> None:
        """Only a receipt for the very bytes that were sent ends an update."""
        if receipt.verdict == "missing":
            for owed in self._owed.values():
                if owed.transfer == receipt.transfer:
                    self._upload(owed, receipt.missing)
            return
        found = self._owed.get(receipt.update_id)
        if found is None or found.transfer != receipt.transfer:
            return
        del self._owed[receipt.update_id]
        self._ledger.ended(receipt.update_id, receipt.verdict, receipt.reason)
        self._tally.receipted(receipt.verdict)

    def _take_release(self, version: int) -> None:
        if self._install is None:
            self.installed(version)
        else:
            self._install(self, version)

    def _beat(self) -> None:
        if self._is_connected:
            body = Telemetry(
                uptime_seconds=max(0.0, self._clock.monotonic() - self._born),
                release_version=self.release,
                requests_total=0,
                errors_total=0,
                samples=0,
                labelled_samples=0,
                outbox=len(self._owed),
            )
            self._outgoing.say(self._speaker.quick(body))
            self._outgoing.pump()
            self._tally.heartbeats += 1
        self._later(self._habits.heartbeat_seconds * (1.0 + self._rng.random() / 5), self._beat)

    def _birth(self, status: str) -> Birth:
        return Birth(
            status=status,  # type: ignore[arg-type]
            boot_id=self._boot_id,
            agent_version=VERSION,
            wire_versions=WIRE_VERSIONS,
            machine="light",
            codecs=CODEC_NAMES,  # type: ignore[arg-type]
            release_version=self.release,
        )


class _Numbers:
    """One epoch: a light agent lives once."""

    def __init__(self) -> None:
        self._seq = 0

    def next(self) -> tuple[int, int]:
        self._seq += 1
        return 1, self._seq


class _Windows:
    """What was heard, in memory."""

    def __init__(self) -> None:
        self._windows: dict[str, Window] = {}

    def accept(self, kind: str, epoch: int, seq: int) -> None:
        self._windows[kind] = self._windows.get(kind, Window()).accept(epoch, seq)
