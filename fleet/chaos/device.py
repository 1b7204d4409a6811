"""A device under faults: the real agent on a real folder, which may die at every point and comes back from its disk.

Laws of the file: nothing of the agent is replaced but what touches the world outside of it (network, clock, child
process, where releases come from); its database, slots and files are real ones; it is asked for an answer at every
point that it passes, and must give one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_agent.agent import Agent
from edge_agent.enrolment.identity import Identity
from edge_agent.ports import Engine, JobKind, JobResult, SelfTest, SelfTestVerdict
from edge_agent.release.fetcher import CHUNK_BYTES
from edge_agent.release.files import SlotContents
from edge_agent.release.install import TufReleases
from edge_agent.release.slots import FOLDER_NAME, Slots
from edge_agent.rounds.masked_rounds import Draft
from edge_agent.rounds.worker import InlineWorker
from edge_agent.settings import EdgeSettings
from edge_agent.store.storage import DATABASE_NAME, open_database
from edge_agent.store.time_floor import FlooredClock
from fleet.chaos.disk import Disk
from fleet.chaos.injector import Crash, Injector
from fleet.chaos.ledger import Ledger
from fleet.chaos.network import DEVICE, ChaosTransport, sort_of
from fleet.chaos.node import NEVER, Node
from fleet.chaos.sqlite import Change, telling
from fleet.virtual import VirtualTime
from models.data.federation import Split
from wire.errors import DataError, ModelError, PeerError, RefusedError, StorageError, TransportError
from wire.messages import Evaluation, Update
from wire.transport import Packet, Received, TransportEvent
from wire.transport.faulty import harmed
from wire.transport.memory import MemoryBroker, MemoryTransport

DOWN_SECONDS = 20.0
JOB_SECONDS = (0.2, 1.5)
SLOW_FACTOR = 60.0
_INSIDE = ("device.commit", "device.slot", "device.job", "device.selftest", "device.fetch")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the devices of one world share.

    Attributes:
        read: a file of the signed repository by its path; raises `TransportError` while the aggregator is away.
    """

    time: VirtualTime
    broker: MemoryBroker
    injector: Injector
    ledger: Ledger
    engine: Engine
    selftest: SelfTest
    settings: EdgeSettings
    read: Callable[[str], bytes | None]
    ready: Callable[[str], None]


class DeviceNode(Node):
    """One device, through all of its lives."""

    def __init__(
        self, identity: Identity, folder: Path, around: Surroundings, split: Split, seed: int
    ) -> None:
        name = identity.device
        super().__init__(
            name, around.time, around.injector, random.Random(f"device {seed} {name}"), DOWN_SECONDS
        )
        self.disk = Disk(
            self.name,
            folder,
            around.injector,
            database=DATABASE_NAME,
            name_commit=lambda changes: telling(changes, _COMMITS),
            name_file=name_file,
            committed=lambda by, changes: around.ledger.device_committed(self.name, by.path, changes),
            here=self._here,
        )
        self.agent: Agent | None = None
        self.is_slow_until = 0.0
        self.is_cut_until = 0.0
        self._identity = identity
        self._around = around
        self._split = split
        self._queue: deque[TransportEvent] = deque()
        self._is_taught = False
        self._is_started = False

    @property
    def is_up(self) -> bool:
        return self.agent is not None and not self.disk.is_dead

    @property
    def wake_at(self) -> float:
        """When its timers want it, on the monotonic clock."""
        return self.agent.wake_at if self.agent is not None and self.is_up else NEVER

    # ---- lives -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._queue.clear()
        self._is_started = False
        super().start()

    def _forget_disk(self) -> None:
        self._around.ledger.device_restarted(self.name)

    def _abandon(self) -> None:
        self.agent = None

    def _open(self) -> None:
        around, folder, clock = self._around, self.disk.folder, self.clock
        database = open_database(
            folder, max_bytes=around.settings.storage.database_bytes, clock=clock, connect=self.disk.connect
        )
        floored = FlooredClock(clock, database)
        life = self.disk.life
        self.transport = ChaosTransport(
            MemoryTransport(around.broker, self.name),
            self.disk,
            around.time.later,
            DEVICE,
            lambda packet: around.ledger.device_sent(self.name, packet),
        )
        agent = Agent(
            around.settings,
            self._identity,
            transport=_Queueing(self.transport, self._enqueue),
            releases=TufReleases(folder / "tuf", self._identity, _Fetcher(self, around.read), floored),
            clock=floored,
            worker=_Worker(self, life),
            rng=random.Random(f"{self._rng.random()}"),
            database=database,
            slots=Slots(folder),
            selftest=_SelfTest(self, around.selftest),
            engine=around.engine,
            notify=lambda: self._ready(life),
        )
        self.agent = agent
        self._listen_to_masks(agent)
        agent.start()
        if not self._is_taught:
            self._teach(agent)
        around.injector.note(self.name, f"up, life {life}")
        around.ledger.read_device(self.name, self.disk.database)
        self._is_started = True
        self.answer()

    def _listen_to_masks(self, agent: Agent) -> None:
        """An update gets its masks outside of the worker: what is made there is noted where it is made."""
        hold, finish = agent.parts.masked.hold, agent.parts.masked.finish
        drafts: dict[bytes, Draft] = {}

        def held(draft: Draft) -> None:
            drafts[draft.update_id] = draft
            hold(draft)

        def finished(order_id: bytes) -> Update | None:
            update = finish(order_id)
            if update is not None:
                self._around.ledger.masked(self.name, drafts.pop(update.update_id), update)
            return update

        agent.parts.masked.hold = held  # type: ignore[method-assign]
        agent.parts.masked.finish = finished  # type: ignore[method-assign]

    def _teach(self, agent: Agent) -> None:
        split = self._split
        for x, y, part in ((split.train_x, split.train_y, "train"), (split.val_x, split.val_y, "val")):
            for window, label in zip(x, y, strict=True):
                agent.observe(window, int(label), part)  # type: ignore[arg-type]
        self._is_taught = True

    def _survived(self, call: Callable[[], None]) -> None:
        """One turn of the agent's outermost loop, which logs what failed and goes on."""
        try:
            call()
        except StorageError as error:
            self._around.injector.note(self.name, f"event failed: {error}")

    # ---- work --------------------------------------------------------------------------------------------------

    def _enqueue(self, event: TransportEvent) -> None:
        self._queue.append(event)
        self._around.ready(self.name)

    def _ready(self, life: int) -> None:
        if self.disk.is_of(life):
            self._around.ready(self.name)

    def _wear(self) -> None:
        """The power goes while the device owes an update, and a worn flash card comes back with other bits."""
        around = self._around
        fault = None
        if around.ledger.owes(self.name):
            fault = around.injector.visit("device.disk.rot", self.name)
        if fault is not None:
            around.ledger.rotten.add(self.name)
            self.disk.die(fault.rng())
            self.disk.rot(fault.rng())
            raise Crash(fault)

    def _pump(self) -> None:
        agent = self.agent
        if agent is None:
            return
        self._survived(agent.pump)
        self._wear()
        while self._queue:
            event = self._queue.popleft()
            fault = None
            if isinstance(event, Received):
                fault = self.disk.pass_by(f"device.receive.{sort_of(event.packet)}")
            if fault is not None and fault.kind == "crash_before":
                self.disk.crash(fault)
            self._survived(lambda: agent.handle(event))  # noqa: B023  called before the next turn
            self._survived(agent.pump)
            if fault is not None:
                self.disk.crash(fault)
        self.answer()

    def _tick(self) -> None:
        if self.agent is not None:
            self._survived(self.agent.tick)

    def cost(self) -> float:
        """Virtual seconds of a job."""
        seconds = self._rng.uniform(*JOB_SECONDS)
        return seconds * SLOW_FACTOR if self._around.time.monotonic() < self.is_slow_until else seconds

    def pass_job(self, kind: JobKind) -> None:
        """The point before a job."""
        fault = self.disk.pass_by(f"device.job.{kind}")
        if fault is not None and fault.kind == "slow":
            self.is_slow_until = self._around.time.monotonic() + fault.rng().uniform(1.0, 90.0)
        elif fault is not None:
            self.disk.crash(fault)

    def _here(self, point: str) -> None:
        # Packets pass between two of the agent's steps, after each of which it is asked anyway.
        if point.startswith(_INSIDE):
            self.answer()

    def answer(self) -> None:
        """Asks the model that serves for an answer, wherever the rest of the agent is just now."""
        agent, ledger = self.agent, self._around.ledger
        if agent is None or self.disk.is_dead or not self._is_started:
            return
        served = agent.parts.serving.current
        if served is None:
            ledger.models.no_model(self.name)
            return
        window = self._split.test_x[0]
        try:
            answer = agent.infer(window)
        except (DataError, ModelError) as error:
            ledger.violated(self.name, f"no answer to an inference: {error}")
            return
        ledger.models.served(self.name, answer.release_version, served.release_sha256.hex())

    def note_trained(self, value: object) -> None:
        """For the ledger."""
        body = value[0] if isinstance(value, tuple) else value
        if isinstance(body, Update | Evaluation):
            self._around.ledger.trained(body)

    def passed_selftest(self, contents: SlotContents) -> None:
        """For the ledger."""
        self._around.ledger.models.passed_selftest(self.name, contents.release_sha256)


class _Queueing:
    """Puts a queue between the transport and the agent, so that every event is a step of its own."""

    def __init__(self, transport: ChaosTransport, enqueue: Callable[[TransportEvent], None]) -> None:
        self._transport = transport
        self._enqueue = enqueue

    def start(self, deliver: object, *, filters: Any, will: Packet | None = None) -> None:
        self._transport.start(self._enqueue, filters=filters, will=will)

    def publish(self, packet: Packet) -> int:
        return self._transport.publish(packet)

    def stop(self, last_words: Packet | None = None) -> None:
        self._transport.stop(last_words)


class _Worker:
    """The simulator's worker, with a point before each job."""

    def __init__(self, node: DeviceNode, life: int) -> None:
        self._node = node
        self._life = life
        self._inner = InlineWorker(node._around.time.later, lambda result: node.cost())

    def submit(
        self, kind: JobKind, key: bytes, work: Callable[[], Any], done: Callable[[JobResult], None]
    ) -> None:
        node, life = self._node, self._life
        node.pass_job(kind)

        def report(result: JobResult) -> None:
            if node.disk.is_of(life):
                done(result)

        def watched() -> Any:
            value = work()
            node.note_trained(value)
            return value

        self._inner.submit(kind, key, watched, report)

    def stop(self) -> None:
        self._inner.stop()


class _SelfTest:
    """The shared verdict, with points around it."""

    def __init__(self, node: DeviceNode, inner: SelfTest) -> None:
        self._node = node
        self._inner = inner

    def check(self, contents: SlotContents) -> SelfTestVerdict:
        disk = self._node.disk
        fault = disk.pass_by("device.selftest")
        if fault is not None and fault.kind == "crash_before":
            disk.crash(fault)
        verdict = self._inner.check(contents)
        self._node.passed_selftest(contents)
        if fault is not None:
            disk.crash(fault)
        return verdict


class _Fetcher:
    """The way to the signed repository."""

    def __init__(self, node: DeviceNode, read: Callable[[str], bytes | None]) -> None:
        self._node = node
        self._read = read
        self.fetched_bytes_total = 0

    def fetch(self, path: str, *, offset: int = 0, limit_bytes: int) -> Iterator[bytes]:
        node, disk = self._node, self._node.disk
        if node.clock.monotonic() < node.is_cut_until:
            raise TransportError("nobody answers")
        data = self._read(path)
        if data is None:
            raise RefusedError(f"there is no {path}", status=404)
        fault = disk.pass_by("device.fetch")
        if fault is not None and fault.kind == "crash_before":
            disk.crash(fault)
        rest = data[offset:]
        is_cut = fault is not None and fault.kind in ("lose", "truncate")
        if fault is not None:
            rest = self._harmed(rest, fault.kind, fault.rng())
        if len(rest) > limit_bytes:
            raise PeerError(f"{path} is longer than allowed", size_bytes=len(rest), limit_bytes=limit_bytes)
        for start in range(0, len(rest), CHUNK_BYTES):
            piece = rest[start : start + CHUNK_BYTES]
            self.fetched_bytes_total += len(piece)
            yield piece
        if is_cut:
            raise TransportError(f"the connection broke at {path}")

    @staticmethod
    def _harmed(data: bytes, kind: str, rng: random.Random) -> bytes:
        if kind == "lose":
            return b""
        return harmed(Packet("fetched", data), kind, rng).payload


_COMMITS: tuple[tuple[Change, str], ...] = (
    (("INSERT", "outbox"), "device.commit.outbox"),
    (("UPDATE", "outbox"), "device.commit.receipt"),
    (("INSERT", "sealings"), "device.commit.sealing"),
    (("INSERT", "orders"), "device.commit.order"),
    (("INSERT", "facts"), "device.commit.sequence"),
    (("INSERT", "windows"), "device.commit.window"),
)


def name_file(operation: str, path: Path) -> str:
    """The point of an operation on a file; the staging folder and the quarantine are no truth of anything."""
    return f"device.slot.{operation}" if FOLDER_NAME in path.parts else ""
