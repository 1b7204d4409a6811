"""The aggregator under faults: the real one on a real database, which may die at every point, or be started twice.

Laws of the file: nothing of the aggregator is replaced but its transport, its clock, its folder and its store of
bytes; what it knows after a crash is what it reads back; a second one that is started by mistake takes over by its
fencing token, and the first is let run on, so that it can be seen to do nothing.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_server.assembly import Assembled, Base, RunConfig, assemble, make_run_parts, open_base
from cloud_server.clock_evidence import ClockGuard, ClockLimits, DeviceClocks, Evidence
from cloud_server.clock_witnesses import hear_witnesses
from cloud_server.db.engine import open_database
from cloud_server.keys import CloudKeys
from cloud_server.release.releaser import Holdout
from cloud_server.release.tuf_repository import TufRepository
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.runner import RoundRunner
from cloud_server.secure.helper_client import AskedHelper
from cloud_server.secure.opening import make_runner
from fleet.chaos.disk import Disk
from fleet.chaos.injector import Injector
from fleet.chaos.ledger import Ledger
from fleet.chaos.model_ledger import RINGS_METADATA
from fleet.chaos.network import CLOUD, ChaosTransport, kind_of, sort_of
from fleet.chaos.node import NEVER, Node
from fleet.chaos.sqlite import Change, CuttableConnection, telling
from fleet.chaos.store import ChaosArtefacts
from fleet.simulated_device import FLEET, TENANT
from fleet.virtual import VirtualTime
from models.bundle import Bundle
from wire.errors import StorageError, TransportError, TrustError
from wire.transport import Packet, Received, TransportEvent
from wire.transport.memory import MemoryBroker, MemoryTransport

if TYPE_CHECKING:
    from fleet.chaos.app import AppLife

DATABASE_NAME = "cloud.db"
CLIENT = "aggregator"
DOWN_SECONDS = 10.0
OLD_SECONDS = 60.0
"""How long an aggregator that lost its database to another goes on trying."""
FARTHEST_SECONDS = 366 * 86_400.0
"""A clock that is further off is seen to be wrong: nothing was signed here for longer than that."""


@dataclass(frozen=True, slots=True)
class CloudSetup:
    """What an aggregator is started with, in every life.

    Attributes:
        helper: of a run with two servers; a machine of its own.
        has_app: a stock Flower ServerApp drives the rounds.
    """

    bundle: Bundle
    config: RunConfig
    keys: CloudKeys
    holdout: Holdout
    seed: int
    helper: AskedHelper | None = None
    has_app: bool = False


@dataclass(slots=True)
class _Owner:
    """One process, as its connections and packets name it; its fencing token once it has one."""

    fence: int = 0


@dataclass(slots=True)
class _Life:
    """One process."""

    number: int
    owner: _Owner
    base: Base
    cloud: Assembled
    runner: RoundRunner
    transport: ChaosTransport
    guard: ClockGuard
    app: AppLife | None = None
    queue: deque[TransportEvent] = field(default_factory=deque)
    wake: float = 0.0


class CloudNode(Node):
    """The aggregator, through all of its lives.

    Args:
        ring_signed: told in the moment in which a ring is signed, before anybody is told.
        updates_heard: told whose updates were heard in a turn, before it commits them.
    """

    deadly = (StorageError, TrustError)

    def __init__(
        self,
        setup: CloudSetup,
        folder: Path,
        files: dict[str, bytes],
        *,
        time: VirtualTime,
        broker: MemoryBroker,
        injector: Injector,
        ledger: Ledger,
        ready: Callable[[str], None],
        ring_signed: Callable[[], None] = lambda: None,
        updates_heard: Callable[[frozenset[str]], None] = lambda devices: None,
    ) -> None:
        super().__init__("cloud", time, injector, random.Random(f"cloud {setup.seed}"), DOWN_SECONDS)
        self.files = files
        self._setup = setup
        self._broker = broker
        self._ledger = ledger
        self._ready = ready
        self._ring_signed = ring_signed
        self._updates_heard = updates_heard
        self._life: _Life | None = None
        self._old: _Life | None = None
        self._apps: list[AppLife] = []
        self._old_until = 0.0
        self.disk = Disk(
            self.name,
            folder,
            injector,
            database=DATABASE_NAME,
            name_commit=lambda changes: telling(changes, _COMMITS),
            name_file=lambda operation, path: "",
            committed=self._committed,
        )

    @property
    def is_up(self) -> bool:
        return self._life is not None and not self.disk.is_dead

    @property
    def is_clock_credible(self) -> bool:
        """Whether the clock may be right, for all that can be known: it is in the years in which anything was done."""
        return abs(self.clock.jump_seconds) < FARTHEST_SECONDS

    @property
    def moved(self) -> int:
        """Rounds that moved the head, for the trace; the ledger counts its own."""
        return self._life.runner.view().moved if self._life is not None else 0

    @property
    def wake_at(self) -> float:
        """When it wants its next turn, on the monotonic clock."""
        if self._life is None or not self.is_up:
            return NEVER
        return self._life.wake - (self.clock.now() - self.clock.monotonic())

    def read(self, path: str) -> bytes | None:
        """A file of the signed repository, as devices fetch it.

        Raises:
            TransportError: the aggregator is away.
        """
        if self._life is None or not self.is_up:
            raise TransportError("the aggregator does not answer")
        return self._life.base.repository.read(path.lstrip("/"))

    # ---- lives -------------------------------------------------------------------------------------------------

    def operate(self, what: Callable[[Base], None]) -> None:
        """What an operator does, with the running aggregator's registry and keys; nothing while it is away."""
        life = self._life
        if life is not None:
            self._guarded(lambda: what(life.base))

    def _open(self) -> None:
        setup, life = self._setup, self.disk.life
        owner, ledger = _Owner(), self._ledger
        database = open_database(
            f"sqlite:///{self.disk.database}", factory=partial(self.disk.connect, owner=owner)
        )
        artefacts = ChaosArtefacts(
            self.files,
            self.disk.pass_by,
            self.disk.crash,
            lambda key, data: self._written(key, data, owner.fence),
        )
        clocks: list[DeviceClocks] = []

        def look() -> Evidence:
            now, monotonic = self.clock.now(), self.clock.monotonic()
            ahead = clocks[0].ahead(now, monotonic) if clocks else None
            signed_at = repository.signed_at()
            return hear_witnesses(now, signed_at=signed_at, database=database, devices_ahead=ahead)

        guard = ClockGuard(self.clock, ClockLimits(), look)
        repository = TufRepository(artefacts, setup.keys, self.clock, may_sign=guard.check)
        guard.check()
        base = replace(
            open_base(database, artefacts, setup.keys, self.clock, tenant=TENANT, fleet=FLEET),
            repository=repository,
        )
        owner.fence = base.fence
        ledger.claimed(base.fence)
        transport = ChaosTransport(
            MemoryTransport(self._broker, CLIENT, queue_packets=100_000),
            self.disk,
            self._time.later,
            CLOUD,
            lambda packet: self._sent(packet, owner.fence),
        )
        cloud = assemble(base, transport, tenant=TENANT, fleet=FLEET, may_send=guard.check)
        clocks.append(cloud.aggregator.device_clocks)
        plan, ports = make_run_parts(base, cloud, setup.bundle, setup.config, setup.holdout)
        app = None
        if setup.has_app:
            runner, app = self._open_app(plan, ports)
        else:
            runner = make_runner(
                plan,
                ports,
                setup.config.masking,
                registry=base.registry,
                downlink=cloud.downlink,
                helper=setup.helper,
            )
        runner.resume(setup.bundle.checkpoint(), setup.seed)
        cloud.aggregator.begin(runner)
        self._life, self.transport = _Life(life, owner, base, cloud, runner, transport, guard, app), transport
        cloud.aggregator.start(self._enqueue)
        ledger.read_cloud(self.disk.database)
        ledger.check_fold(self.disk.database)
        self._injector.note(self.name, f"up, life {life}, fence {base.fence}")

    def _open_app(self, plan: RunPlan, ports: RunPorts) -> tuple[RoundRunner, AppLife]:
        """Flower is loaded by histories that have an app, and by no others."""
        from cloud_server.flower.serverapp import make_serverapp_runner
        from fleet.chaos.app import AppLife
        from fleet.chaos.server_app import averaging_app

        life, bundle = AppLife(), self._setup.bundle
        self._apps.append(life)
        runner, life.stop = make_serverapp_runner(
            plan,
            ports,
            averaging_app(bundle.manifest, bundle.checkpoint()),
            make_board=life.make_board,
            spawn=life.turns.spawn,
        )
        return runner, life

    def _forget_disk(self) -> None:
        self._ledger.cloud_restarted()

    def _abandon(self) -> None:
        self._old, self._life = None, None
        self.end_apps()

    def end_apps(self) -> None:
        """Ends the threads of every process that there was."""
        while self._apps:
            self._apps.pop().end()

    def _sent(self, packet: Packet, fence: int) -> None:
        self._check_year(f"sent {packet.topic}")
        self._ledger.cloud_sent(packet, fence)

    def _check_year(self, what: str) -> None:
        if not self.is_clock_credible:
            self._ledger.violated("cloud", f"{what} by a clock that is in another year")

    def _written(self, key: str, data: bytes, fence: int) -> None:
        if key.startswith("tuf/"):
            self._check_year(f"signed {key}")
        self._ledger.written(key, data, fence)
        if key.endswith(RINGS_METADATA):
            self._ring_signed()

    # ---- work --------------------------------------------------------------------------------------------------

    def _enqueue(self, event: TransportEvent) -> None:
        if self._life is not None:
            self._life.queue.append(event)
            self._ready(self.name)

    def _pump(self) -> None:
        life, heard = self._life, set[str]()
        if life is not None:
            life.guard.check()
        while life is not None and life.queue:
            if kind_in(life.queue[0]) == "up" and self.disk.pass_by("cloud.rival") is not None:
                self._start_second(life)
                return
            event = life.queue.popleft()
            fault = None
            if isinstance(event, Received):
                fault = self.disk.pass_by(f"cloud.receive.{sort_of(event.packet)}")
                if kind_of(event.packet) == "up":
                    heard.add(device_of(event.packet))
            if fault is not None and fault.kind == "crash_before":
                self.disk.crash(fault)
            life.cloud.aggregator.handle(event)
            if fault is not None:
                self.disk.crash(fault)
        if heard:
            self._updates_heard(frozenset(heard))
        self._tick()

    def _start_second(self, first: _Life) -> None:
        """Somebody starts the aggregator again while it runs: the second takes over, the first does not know."""
        self._old, self._old_until = first, self._time.monotonic() + OLD_SECONDS
        self._life = None
        self._open()

    def _let_old_try(self) -> None:
        """The first one handles what it had heard already, and takes its turns."""
        old = self._old
        if old is None:
            return
        self.disk.is_quiet = True
        try:
            while old.queue:
                old.cloud.aggregator.handle(old.queue.popleft())
            _turn(old)
        except self.deadly as error:
            self._injector.note(self.name, f"the first one ended: {error}")
            self._old = None
        finally:
            self.disk.is_quiet = False
        if self._time.monotonic() > self._old_until:
            self._old = None

    def _committed(self, connection: CuttableConnection, changes: frozenset[Change]) -> None:
        fence = connection.owner.fence if isinstance(connection.owner, _Owner) else 0
        self._ledger.cloud_committed(connection.path, changes, fence)

    def _tick(self) -> None:
        self._let_old_try()
        life = self._life
        if life is None:
            return
        life.guard.check()
        fault = self.disk.pass_by("cloud.tick")
        if fault is not None and fault.kind == "crash_before":
            self.disk.crash(fault)
        life.wake = _turn(life)
        if life.app is not None and life.runner.is_finished:
            self._ledger.violated("cloud", "the app has ended, which has no end")
        if fault is not None:
            self.disk.crash(fault)


def _turn(life: _Life) -> float:
    """One turn of an aggregator, and of its app as long as that has something to do; when it wants the next one."""
    wake = life.cloud.aggregator.tick()
    while life.app is not None and life.app.turns.work():
        wake = life.cloud.aggregator.tick()
    return wake


def device_of(packet: Packet) -> str:
    """Whose update a packet is a chunk of, by its topic."""
    return packet.topic.split("/")[6]


def kind_in(event: TransportEvent) -> str:
    """What kind of packet an event brings; empty for another event."""
    return kind_of(event.packet) if isinstance(event, Received) else ""


_COMMITS: tuple[tuple[Change, str], ...] = (
    (("INSERT", "checkpoints"), "cloud.commit.fold"),
    (("INSERT", "privacy_ledger"), "cloud.commit.charge"),
    (("INSERT", "rounds"), "cloud.commit.open"),
    (("INSERT", "grid_steps"), "cloud.commit.step"),
    (("INSERT", "updates"), "cloud.commit.update"),
    (("UPDATE", "rounds"), "cloud.commit.round"),
    (("INSERT", "releases"), "cloud.commit.release"),
    (("UPDATE", "releases"), "cloud.commit.release"),
    (("INSERT", "presence"), "cloud.commit.device"),
    (("UPDATE", "presence"), "cloud.commit.device"),
    (("UPDATE", "devices"), "cloud.commit.device"),
)
