"""The aggregator under faults: the real one on a real database, which may die at every point, or be started twice.

Laws of the file: nothing of the aggregator is replaced but its transport, its clock, its folder and its store of
bytes; what it knows after a crash is what it reads back; a second one that is started by mistake takes over by its
fencing token, and the first is let run on, so that it can be seen to do nothing.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cloud_server.assembly import Assembled, Base, RunConfig, assemble, make_run_parts, open_base
from cloud_server.db.engine import open_database
from cloud_server.keys import CloudKeys
from cloud_server.release.releaser import Holdout
from cloud_server.rounds.runner import RoundRunner
from cloud_server.secure.opening import make_runner
from fleet.chaos.device import NodeClock
from fleet.chaos.disk import Disk
from fleet.chaos.injector import Crash, Injector
from fleet.chaos.ledger import Ledger
from fleet.chaos.network import CLOUD, ChaosTransport, kind_of
from fleet.chaos.sqlite import Change, CuttableConnection, telling
from fleet.chaos.store import ChaosArtefacts
from fleet.simulated_device import FLEET, TENANT
from fleet.virtual import VirtualTime
from models.bundle import Bundle
from wire.errors import StorageError, TransportError
from wire.transport import Received, TransportEvent
from wire.transport.memory import MemoryBroker, MemoryTransport

DATABASE_NAME = "cloud.db"
CLIENT = "aggregator"
DOWN_SECONDS = 10.0
OLD_SECONDS = 60.0
"""How long an aggregator that lost its database to another goes on trying."""


@dataclass(frozen=True, slots=True)
class CloudSetup:
    """What an aggregator is started with, in every life."""

    bundle: Bundle
    config: RunConfig
    keys: CloudKeys
    holdout: Holdout
    seed: int


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
    queue: deque[TransportEvent] = field(default_factory=deque)
    wake: float = 0.0


class CloudNode:
    """The aggregator, through all of its lives."""

    name = "cloud"

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
    ) -> None:
        self.clock = NodeClock(time)
        self.files = files
        self._setup = setup
        self._time = time
        self._broker = broker
        self._injector = injector
        self._ledger = ledger
        self._ready = ready
        self._rng = random.Random(f"cloud {setup.seed}")
        self._life: _Life | None = None
        self._old: _Life | None = None
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
    def moved(self) -> int:
        """Rounds that moved the head, for the trace; the ledger counts its own."""
        return self._life.runner.view().moved if self._life is not None else 0

    def wake_at(self) -> float:
        """When it wants its next turn, in unix seconds of virtual time."""
        if self._life is None or not self.is_up:
            return float("inf")
        return self._life.wake - self.clock.jump_seconds

    def read(self, path: str) -> bytes | None:
        """A file of the signed repository, as devices fetch it.

        Raises:
            TransportError: the aggregator is away.
        """
        if self._life is None or not self.is_up:
            raise TransportError("the aggregator does not answer")
        return self._life.base.repository.read(path.lstrip("/"))

    # ---- lives -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Opens what is on the disk and goes on with the run; a fault may end this at once."""
        if self.disk.is_dead:
            # First: whoever closes a database last writes its log into its pages.
            self._ledger.cloud_restarted()
            self.disk.come_back()
        self._guarded(self._open)

    def revoke(self, device: str) -> bool:
        """What the operator does; False while the aggregator is away."""
        life = self._life
        if life is None or not self.is_up:
            return False
        self._guarded(lambda: life.base.registry.revoke(device, "stolen"))
        return self.is_up

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
            lambda key, data: ledger.written(key, data, owner.fence),
        )
        base = open_base(database, artefacts, setup.keys, self.clock, tenant=TENANT, fleet=FLEET)
        owner.fence = base.fence
        ledger.claimed(base.fence)
        transport = ChaosTransport(
            MemoryTransport(self._broker, CLIENT, queue_packets=100_000),
            self.disk,
            self._time.later,
            CLOUD,
            lambda packet: ledger.cloud_sent(packet, owner.fence),
        )
        cloud = assemble(base, transport, tenant=TENANT, fleet=FLEET)
        plan, ports = make_run_parts(base, cloud, setup.bundle, setup.config, setup.holdout)
        runner = make_runner(
            plan, ports, setup.config.masking, registry=base.registry, downlink=cloud.downlink
        )
        runner.resume(setup.bundle.checkpoint(), setup.seed)
        cloud.aggregator.begin(runner)
        self._life = _Life(life, owner, base, cloud, runner, transport)
        cloud.aggregator.start(self._enqueue)
        ledger.read_cloud(self.disk.database)
        ledger.check_fold(self.disk.database)
        self._injector.note(self.name, f"up, life {life}, fence {base.fence}")

    def _guarded(self, call: Callable[[], None]) -> None:
        if self.disk.is_dead:
            return
        try:
            call()
        except Crash:
            self._fell()
        except StorageError as error:
            # The service ends with it, and its supervisor starts it again.
            self._injector.note(self.name, f"ended: {error}")
            self.disk.die(self._rng)
            self._fell()

    def _fell(self) -> None:
        self._injector.note(self.name, "down")
        self._old = None
        if self._life is not None:
            self._life.transport.drop("the process is gone", for_seconds=float("inf"))
        self._life = None
        self._time.later(self._rng.uniform(0.1, DOWN_SECONDS), self.start)

    # ---- work --------------------------------------------------------------------------------------------------

    def _enqueue(self, event: TransportEvent) -> None:
        if self._life is not None:
            self._life.queue.append(event)
            self._ready(self.name)

    def pump(self) -> None:
        """Handles what waits, and takes its turn."""
        self._guarded(self._pump)

    def tick(self) -> None:
        """Takes its turn."""
        self._guarded(self._tick)

    def _pump(self) -> None:
        life = self._life
        while life is not None and life.queue:
            if kind_in(life.queue[0]) == "up" and self.disk.pass_by("cloud.rival") is not None:
                self._start_second(life)
                return
            event = life.queue.popleft()
            fault = None
            if isinstance(event, Received):
                fault = self.disk.pass_by(f"cloud.receive.{kind_of(event.packet)}")
            if fault is not None and fault.kind == "crash_before":
                self.disk.crash(fault)
            life.cloud.aggregator.handle(event)
            if fault is not None:
                self.disk.crash(fault)
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
            old.cloud.aggregator.tick()
        except StorageError as error:
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
        fault = self.disk.pass_by("cloud.tick")
        if fault is not None and fault.kind == "crash_before":
            self.disk.crash(fault)
        life.wake = life.cloud.aggregator.tick()
        if fault is not None:
            self.disk.crash(fault)


def kind_in(event: TransportEvent) -> str:
    """What kind of packet an event brings; empty for another event."""
    return kind_of(event.packet) if isinstance(event, Received) else ""


_COMMITS: tuple[tuple[Change, str], ...] = (
    (("INSERT", "checkpoints"), "cloud.commit.fold"),
    (("INSERT", "rounds"), "cloud.commit.open"),
    (("INSERT", "updates"), "cloud.commit.update"),
    (("UPDATE", "rounds"), "cloud.commit.round"),
    (("INSERT", "releases"), "cloud.commit.release"),
    (("UPDATE", "releases"), "cloud.commit.release"),
    (("INSERT", "presence"), "cloud.commit.device"),
    (("UPDATE", "presence"), "cloud.commit.device"),
    (("UPDATE", "devices"), "cloud.commit.device"),
)
