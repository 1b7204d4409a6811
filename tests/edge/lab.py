"""A fleet in one process: the real agent on the in-memory broker, and a cloud that a test conducts by hand.

The cloud here decides nothing by itself, but every byte of it is real: TUF metadata from the aggregator's own
repository, messages signed and opened by `wire`, graphs from `models`. Time is virtual.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloud_server.artefacts import Artefacts
from cloud_server.keys import CloudKeys
from cloud_server.release.tuf_repository import TufRepository
from edge_agent.agent import Agent
from edge_agent.enrolment.identity import Identity
from edge_agent.ports import JobResult, SelfTest
from edge_agent.release.fetcher import MemoryFetcher
from edge_agent.release.install import TufReleases
from edge_agent.release.memory_slots import MemorySlots, SharedReleases
from edge_agent.release.selftest import InlineSelfTest
from edge_agent.release.slots import SlotStore
from edge_agent.rounds.worker import InlineWorker
from edge_agent.runtime import Runtime
from edge_agent.settings import EdgeSettings
from edge_agent.store.storage import MEMORY, Database, open_database
from edge_agent.vitals.machine import Machine
from models.bundle import Bundle
from models.candidate import Candidate, CandidateMaker
from wire import envelope
from wire.blobs import make_ref
from wire.checkpoint import Checkpoint
from wire.chunks import Reassembly
from wire.errors import EnvelopeError
from wire.header import Header
from wire.messages import (
    BODIES,
    Announcement,
    Birth,
    Body,
    Evaluation,
    Invitation,
    Join,
    Need,
    Order,
    Receipt,
    TrainConfig,
    Update,
    decode_body,
    encode_body,
)
from wire.primitives import SigningKey, sha256
from wire.topics import Topics
from wire.transport import Packet, Received, Transport, TransportEvent
from wire.transport.faulty import FaultPlan, FaultyTransport
from wire.transport.memory import MemoryBroker, MemoryTransport

TENANT, FLEET = "acme", "watches"
START = 1_800_000_000.0
LIMIT = 64 * 2**20
Floats = NDArray[np.float32]


class VirtualTime:
    """A clock that moves from one planned thing to the next."""

    def __init__(self) -> None:
        self.elapsed = 0.0
        self.wall_offset = START
        self._plans: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def now(self) -> float:
        return self.wall_offset + self.elapsed

    def monotonic(self) -> float:
        return self.elapsed

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._plans, (self.elapsed + seconds, next(self._count), call))

    def next_due(self) -> float:
        return self._plans[0][0] if self._plans else float("inf")

    def advance_to(self, elapsed: float) -> None:
        self.elapsed = max(self.elapsed, elapsed)
        while self._plans and self._plans[0][0] <= self.elapsed:
            heapq.heappop(self._plans)[2]()


@dataclass
class Heard:
    """One message that a device sent, opened."""

    header: Header
    body: Body
    transfer: bytes = b""


class Cloud:
    """The other side, conducted by a test."""

    def __init__(self, bundle: Bundle, broker: MemoryBroker, time: VirtualTime) -> None:
        self.bundle = bundle
        self.keys = CloudKeys.from_seed(b"edge lab")
        self.time = time
        self.epoch = 1
        self.topics = Topics(TENANT, FLEET)
        self.heard: list[Heard] = []
        self.refused: list[str] = []
        self.devices: dict[bytes, envelope.Signer] = {}
        self.repository = TufRepository(Artefacts.in_memory(), self.keys, time)
        self.repository.init(online_keys=self.keys.online_json(tenant=TENANT, fleet=FLEET))
        self.maker = CandidateMaker(bundle)
        self.transport = MemoryTransport(broker, "cloud")
        self._reassembly = Reassembly(LIMIT, max_transfers=64)
        self._seq = itertools.count(1)
        self._orders = itertools.count(1)
        self.transport.start(self._deliver, filters=[(name, 1) for name in self.topics.cloud_filters()])

    # --- down ---

    def say(
        self,
        body: Body,
        *,
        device: str,
        topic: str,
        retain: bool = False,
        key: SigningKey | None = None,
        expiry: int = 0,
    ) -> bytes:
        header = Header(
            type=body.TYPE,
            direction="down",
            tenant=TENANT,
            fleet=FLEET,
            device=device,
            epoch=self.epoch,
            seq=next(self._seq),
            expiry=expiry,
        )
        message = envelope.sign(header, encode_body(body), signer=key or self.keys.order)
        self.transport.publish(Packet(topic, message, qos=1, retain=retain))
        return message

    def head_of(self, params: Floats) -> Checkpoint:
        """A train-only head: no activation ranges."""
        return Checkpoint(
            params, np.zeros(self.bundle.manifest.buffers_size, np.float32), np.zeros((0, 2), np.float32)
        )

    def invite(
        self,
        checkpoint: Checkpoint,
        *,
        round_number: int = 1,
        seconds: float = 60.0,
        chunk_bytes: int = 4096,
        config: TrainConfig | None = None,
        graphs: bytes | None = None,
    ) -> Invitation:
        ref, self._chunks = make_ref(checkpoint.to_bytes(), chunk_bytes)
        self.invitation = Invitation(
            run="spring",
            round_number=round_number,
            open=True,
            deadline=self.time.now() + seconds,
            graphs_sha256=graphs or bytes.fromhex(self.bundle.manifest.graphs_sha256),
            head=ref,
            train=config or TrainConfig(epochs=2, batch_size=8, learning_rate=0.05),
        )
        self.say(self.invitation, device="*", topic=self.topics.invitation(None), retain=True)
        return self.invitation

    def broadcast(self, *, skip: tuple[int, ...] = ()) -> None:
        sha = self.invitation.head.sha256.hex()
        for index, chunk in enumerate(self._chunks):
            if index not in skip:
                self.transport.publish(Packet(self.topics.blob_chunk(sha, index), chunk))

    def order(self, device: str, kind: str = "train", **changes: object) -> Order:
        facts: dict[str, object] = {
            "order_id": next(self._orders).to_bytes(16, "big"),
            "kind": kind,
            "run": self.invitation.run,
            "round_number": self.invitation.round_number,
            "head_sha256": self.invitation.head.sha256,
            "deadline": self.invitation.deadline,
            "slot_bytes": 2**20,
        }
        order = Order(**{**facts, **changes})  # type: ignore[arg-type]
        self.send_order(device, order)
        return order

    def send_order(self, device: str, order: Order) -> bytes:
        return self.say(order, device=device, topic=self.topics.by_device("cm", device))

    def receipt(
        self, device: str, heard: Heard, verdict: str = "stored", *, expiry: int = 0, **changes: object
    ) -> None:
        assert isinstance(heard.body, Update | Evaluation)
        facts = {"update_id": heard.body.update_id, "transfer": heard.transfer, "verdict": verdict, **changes}
        topic = self.topics.by_device("ak", device)
        self.say(Receipt(**facts), device=device, topic=topic, expiry=expiry)  # type: ignore[arg-type]

    def release(self, candidate: Candidate, version: int, *, announce: bool = True) -> None:
        if version == 1:
            self.repository.add_graphs(
                self.bundle.manifest.graphs_sha256,
                {ref.name: self.bundle.read(ref.name) for ref in self.bundle.manifest.files}
                | {"manifest.json": self.bundle.manifest.to_bytes()},
            )
        release = candidate.release(version, {}, self.time.now())
        files = {
            "checkpoint.bin": candidate.checkpoint.to_bytes(),
            "golden_inputs.bin": candidate.golden_inputs,
            "golden_outputs.bin": candidate.golden_outputs,
        }
        self.repository.add_release(release, files)
        self.repository.set_ring("stable", version)
        if announce:
            self.announce(version)

    def announcement(self, version: int) -> Announcement:
        return Announcement(channel="stable", release_version=version, timestamp=self.repository.timestamp())

    def announce(self, version: int) -> None:
        self.say(
            self.announcement(version), device="*", topic=self.topics.announcement("stable"), retain=True
        )

    def candidate(self, params: Floats | None = None) -> Candidate:
        checkpoint = self.bundle.checkpoint()
        return self.maker.make(checkpoint.params if params is None else params, checkpoint.buffers)

    # --- up ---

    def of(self, kind: type[Body]) -> list[Heard]:
        return [heard for heard in self.heard if isinstance(heard.body, kind)]

    def _deliver(self, event: TransportEvent) -> None:
        if not isinstance(event, Received):
            return
        packet = event.packet
        topic = self.topics.parse(packet.topic)
        message, transfer = packet.payload, b""
        if topic.kind == "up":
            whole = self._reassembly.add(packet.payload)
            if whole is None:
                return
            message, transfer = whole, sha256(whole)
        self._open(message, topic.kind, topic.device, transfer)

    def _open(self, message: bytes, kind: str, device: str, transfer: bytes) -> None:
        types = frozenset(("up", "ev")) if kind == "up" else kind
        expect = envelope.Expect("up", TENANT, FLEET, types, device)
        recipients = {key.key_id: key for key in self.keys.kem}
        try:
            if kind in (Birth.TYPE, Need.TYPE):
                opened = envelope.open_signed(
                    message, signers=self.devices, expect=expect, now=self.time.now(), limit_bytes=LIMIT
                )
            else:
                opened = envelope.open_sealed(
                    message, signers=self.devices, recipients=recipients, expect=expect,
                    now=self.time.now(), limit_bytes=LIMIT,
                )  # fmt: skip
        except EnvelopeError as error:
            self.refused.append(str(error.facts["reason"]))
            return
        body = decode_body(opened.body, BODIES[opened.header.type])
        self.heard.append(Heard(opened.header, body, transfer))


@dataclass
class Lab:
    """A broker, a conducted cloud and any number of agents."""

    bundle: Bundle
    folder: Path
    time: VirtualTime = field(default_factory=VirtualTime)
    agents: list[Agent] = field(default_factory=list)
    runtime: Runtime = field(default_factory=lambda: Runtime(kept=8))
    shared: SharedReleases = field(default_factory=SharedReleases)
    job_seconds: float = 1.0
    results: list[JobResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.broker = MemoryBroker(self.time)
        self.cloud = Cloud(self.bundle, self.broker, self.time)

    def identity(self, device: str) -> Identity:
        key = SigningKey.from_bytes(sha256(device.encode()))
        kem, orders = self.cloud.keys.online_keys()
        self.cloud.devices[key.key_id] = envelope.Signer(device, key.verify_key)
        return Identity(
            tenant=TENANT,
            fleet=FLEET,
            device=device,
            url_enrol="https://cloud:1",
            url_api="https://cloud:2",
            tls_name="cloud",
            mqtt_host="cloud",
            mqtt_port=3,
            mqtt_tls=False,
            ca_pem=b"",
            certificate_pem=b"",
            update_key=key,
            tuf_root=self.cloud.repository.first_root(),
            kem=kem,
            orders=orders,
        )

    def agent(
        self,
        device: str = "dev-1",
        *,
        settings: EdgeSettings | None = None,
        database: Database | None = None,
        slots: SlotStore | None = None,
        selftest: SelfTest | None = None,
        source: Callable[[str], bytes | None] | None = None,
        plan: FaultPlan | None = None,
        seed: int = 0,
        start: bool = True,
        status_file: Path | None = None,
        identity: Identity | None = None,
        machine: Machine | None = None,
    ) -> Agent:
        identity = identity or self.identity(device)
        fetcher = MemoryFetcher(source or self.cloud.repository.read)
        transport: Transport = MemoryTransport(self.broker, device)
        if plan is not None:
            transport = FaultyTransport(MemoryTransport(self.broker, device), plan, random.Random(seed))
        agent = Agent(
            settings or EdgeSettings(),
            identity,
            transport=transport,
            releases=TufReleases(self.folder / device / "tuf", identity, fetcher, self.time),
            clock=self.time,
            worker=InlineWorker(self.time.later, self._cost),
            rng=random.Random(device),
            database=database or open_database(MEMORY, clock=self.time),
            slots=slots or MemorySlots(self.shared),
            selftest=selftest or InlineSelfTest(self.runtime),
            engine=self.runtime,
            machine=machine,
            status_file=status_file,
        )
        self.agents.append(agent)
        if start:
            agent.start()
            self.settle()
        return agent

    def _cost(self, result: JobResult) -> float:
        self.results.append(result)
        return self.job_seconds

    def settle(self) -> None:
        """Delivers everything that is under way, without letting time pass."""
        while True:
            delivered = self.broker.pump()
            for agent in self.agents:
                agent.pump()
                agent.tick()
            if not delivered and not self.broker.pump():
                return

    def run(self, seconds: float) -> None:
        """Lets time pass, from one due thing to the next."""
        end = self.time.elapsed + seconds
        while True:
            self.settle()
            due = min(
                self.time.next_due(),
                self.broker.next_due() or float("inf"),
                *(agent.wake_at for agent in self.agents),
            )
            if due > end:
                break
            self.time.advance_to(due)
        self.time.advance_to(end)
        self.settle()

    def joins(self) -> list[Join]:
        return [heard.body for heard in self.cloud.of(Join) if isinstance(heard.body, Join)]


def windows(bundle: Bundle, count: int, seed: int = 0) -> tuple[Floats, NDArray[np.int64]]:
    """Separable windows: the label is the third of the input that has the largest mean."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, *bundle.manifest.input_shape)).astype(np.float32)
    labels = rng.integers(0, bundle.manifest.task.classes, count)
    flat = x.reshape(count, -1)
    share = flat.shape[1] // bundle.manifest.task.classes
    for row, label in enumerate(labels):
        flat[row, label * share : (label + 1) * share] += 1.5
    return x, labels.astype(np.int64)


def feed(agent: Agent, bundle: Bundle, count: int = 40, seed: int = 0) -> None:
    """Gives an agent labelled samples, four of five to train on."""
    x, y = windows(bundle, count, seed)
    for number, (window, label) in enumerate(zip(x, y, strict=True)):
        agent.observe(window, int(label), "val" if number % 5 == 0 else "train")
