"""A run in one process on a virtual clock: the real runner, database, artefacts and strategies, with
devices that answer by arithmetic instead of training.

All follows from names and numbers, so two runs can be compared bit for bit. A fuse blows at a chosen step
(before or after a commit, a send, a blob, a decision): that is where the process "ends"; a new runner then
goes on.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from cloud_server.artefacts import Artefacts
from cloud_server.db import schema
from cloud_server.db.engine import Connection, Database, open_database
from cloud_server.flower.driver import StrategyDriver
from cloud_server.flower.strategies import build_strategy
from cloud_server.rounds.intake import Arrival
from cloud_server.rounds.plan import RunPlan, RunPorts
from cloud_server.rounds.ports import Candidate, Decision, Strategy
from cloud_server.rounds.runner import RoundRunner
from cloud_server.rounds.state import RoundPolicy
from wire.blobs import make_ref
from wire.checkpoint import Checkpoint
from wire.codec import encode
from wire.header import Header
from wire.manifest import FileRef, Manifest, StateSizes, TaskSpec, TensorSlot
from wire.manifest_layout import Float32Layout, Int8Layout
from wire.messages import (
    BlobRef,
    Evaluation,
    Invitation,
    Join,
    Order,
    Receipt,
    TrainConfig,
    Update,
    encode_body,
)

SHAPES: dict[str, tuple[int, ...]] = {
    "first.weight": (6, 4),
    "first.bias": (6,),
    "last.weight": (3, 6),
    "scale": (),
}
RUN = "spring"
START = 1_700_000_000.0


def make_slots(shapes: Mapping[str, tuple[int, ...]]) -> tuple[TensorSlot, ...]:
    found, offset = [], 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=int))
        found.append(TensorSlot(name=name, shape=shape, offset=offset, size=size))
        offset += size
    return tuple(found)


def make_manifest(shapes: Mapping[str, tuple[int, ...]] = SHAPES, buffers: int = 0) -> Manifest:
    """A manifest whose vectors matter and whose templates do not."""
    params = make_slots(shapes)
    return Manifest(
        model="lab",
        task=TaskSpec(
            kind="classification", loss="cross_entropy", metric="accuracy", higher_is_better=True, classes=3
        ),
        input_shape=(4,),
        output_name="logits",
        params_size=sum(slot.size for slot in params),
        buffers_size=buffers,
        opt_state_sizes=StateSizes(sgd=0, adam=0),
        params=params,
        buffers=make_slots({"mean": (buffers,)}) if buffers else (),
        ranges_count=0,
        int8=Int8Layout(weight_max=127, layers=(), ranges=()),
        float32=Float32Layout(layers=()),
        files=(FileRef.of("template.onnx", b""), FileRef.of("float32.onnx", b"")),
        golden_inputs_shape=(1, 4),
        golden_outputs_shape=(2, 1, 3),
        tolerance=0.1,
    )


def rng_of(*labels: object) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(repr(labels).encode()).digest()))


class VirtualClock:
    def __init__(self) -> None:
        self.time = START

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time


class BlownFuseError(Exception):
    """The process ended here."""


@dataclass
class Fuse:
    """Counts the steps at which a process can end; blows at step `at`."""

    at: int = -1
    steps: list[str] = field(default_factory=list)

    def burn(self, what: str) -> None:
        self.steps.append(what)
        if len(self.steps) - 1 == self.at:
            raise BlownFuseError(what)


class FusedDatabase(Database):
    """The real database, with a fuse on both sides of every commit."""

    fuse = Fuse()

    @contextmanager
    def transaction(self, *, fence: int | None = None) -> Iterator[Connection]:
        with super().transaction(fence=fence) as connection:
            yield connection
            self.fuse.burn("before commit")
        self.fuse.burn("after commit")


@dataclass
class Message:
    header: Header
    body: bytes


Behaviour = Callable[["Device", Order], "Message | Join | None"]


@dataclass
class Device:
    """Answers orders. `answers` is its outbox: what has no receipt yet is sent again."""

    name: str
    lab: Lab
    seq: int = 0
    behaviour: Behaviour | None = None
    answers: dict[bytes, Message | Join] = field(default_factory=dict)
    receipts: list[Receipt] = field(default_factory=list)

    def answer(self, order: Order) -> Message | Join | None:
        if order.order_id not in self.answers:
            made = (self.behaviour or Device.honest)(self, order)
            if made is None:
                return None
            self.answers[order.order_id] = made
        return self.answers[order.order_id]

    def honest(self, order: Order) -> Message:
        return self.message(self.update(order) if order.kind == "train" else self.evaluation(order), order)

    def message(self, reply: Update | Evaluation, order: Order) -> Message:
        self.seq += 1
        header = Header(
            type=reply.TYPE,
            direction="up",
            tenant="t",
            fleet="f",
            device=self.name,
            epoch=1,
            seq=self.seq,
            run=order.run,
            round_number=order.round_number,
            base=order.head_sha256,
            schema=self.lab.plan.graphs_sha256,
        )
        return Message(header, encode_body(reply))

    def local_update(self, order: Order) -> NDArray[np.float32]:
        """A step towards what this device would like, with noise that follows from its name and the round."""
        head = self.lab.head(order.head_sha256).params
        target = rng_of("target", self.name).normal(0, 1, head.size)
        noise = rng_of("noise", self.name, order.round_number).normal(0, 0.05, head.size)
        return (0.5 * (target - head) + noise).astype(np.float32)

    def update(self, order: Order, vector: NDArray[np.float32] | None = None, **changes: Any) -> Update:
        vector = self.local_update(order) if vector is None else vector
        codec = self.lab.plan.train.codec
        buffers = rng_of("buffers", self.name).normal(1, 0.1, self.lab.plan.manifest.buffers_size)
        values: dict[str, Any] = {
            "update_id": hashlib.sha256(b"update" + self.name.encode() + order.order_id).digest()[:16],
            "order_id": order.order_id,
            "run": order.run,
            "round_number": order.round_number,
            "base_sha256": order.head_sha256,
            "num_examples": int(rng_of("examples", self.name).integers(20, 60)),
            "codec": codec,
            "params_size": vector.size,
            "payload": encode(vector, codec, rng_of("codec", self.name, order.round_number)),
            "buffers": buffers.astype("<f2").tobytes(),
            "metrics": {"loss_first": 1.5, "loss_last": 0.5, "update_norm": float(np.linalg.norm(vector))},
        }
        return Update(**{**values, **changes})

    def evaluation(self, order: Order) -> Evaluation:
        distance = float(np.abs(self.lab.head(order.head_sha256).params).mean())
        return Evaluation(
            update_id=hashlib.sha256(b"evaluation" + self.name.encode() + order.order_id).digest()[:16],
            order_id=order.order_id,
            run=order.run,
            round_number=order.round_number,
            base_sha256=order.head_sha256,
            num_examples=10,
            metrics={"accuracy": 1 / (1 + distance), "loss": distance},
        )


class Lab:
    """The service around one run: directory, outbox, finisher, releaser and blobs, all at once."""

    def __init__(
        self,
        devices: int = 4,
        *,
        strategy: str = "FedAvg",
        parameters: Mapping[str, Any] | None = None,
        make_strategy: Callable[[], Strategy] | None = None,
        make_runner: Callable[[RunPlan, RunPorts], RoundRunner] = RoundRunner,
        buffers: int = 0,
        train: TrainConfig | None = None,
        seed: int = 7,
        patch_codec: Any = "",
        database: str = "sqlite://",
        **policy: Any,
    ) -> None:
        manifest = make_manifest(buffers=buffers)
        rules = {"quorum": 2, "rounds": 2, "round_seconds": 60.0, "backoff_seconds": 5.0, **policy}
        self.plan = RunPlan(
            run=RUN,
            manifest=manifest,
            policy=RoundPolicy(**rules),
            train=train or TrainConfig(codec="int8", clipping_norm=100.0),
            patch_codec=patch_codec,
        )
        self._make_strategy = make_strategy or (
            lambda: StrategyDriver(
                build_strategy(strategy, parameters), manifest.params, buffers_size=manifest.buffers_size
            )
        )
        self._make_runner = make_runner
        self.seed = seed
        self.clock = VirtualClock()
        self.fuse = Fuse()
        self.blobs = Artefacts.in_memory()
        opened = open_database(database)
        opened.migrate()
        self.database = FusedDatabase(opened._engine)
        self.database.fuse = self.fuse
        self.devices = {name: Device(name, self) for name in (f"d{i:02d}" for i in range(devices))}
        self.absent: set[str] = set()
        self.inbox: deque[tuple[str, Order]] = deque()
        self.orders: list[tuple[str, Order]] = []
        self.invitations: list[Invitation] = []
        self.broadcast: list[bytes] = []
        self.candidates: dict[int, Candidate] = {}
        self.initial = Checkpoint(
            params=rng_of("initial").normal(0, 0.1, manifest.params_size).astype(np.float32),
            buffers=np.zeros(buffers, np.float32),
            ranges=np.zeros((0, 2), np.float32),
        )
        self._register()
        self.runner = self.restart()

    def _register(self) -> None:
        manifest = self.plan.manifest
        model = {
            "graphs_sha256": manifest.graphs_sha256,
            "name": manifest.model,
            "manifest": manifest.to_bytes(),
            "checkpoint_sha256": self.initial.sha256.hex(),
            "created": START,
        }
        with open_transaction(self.database) as connection:
            connection.execute(sa.insert(schema.models).values(**model))
            for name in self.devices:
                row = {
                    "device": name,
                    "node_id": self.node_id(name),
                    "pseudonym": name,
                    "status": "approved",
                    "update_key": "00",
                    "certificate_serial": "",
                    "certificate_not_after": 0.0,
                    "enrolled_at": START,
                    "max_examples": self.max_examples(name),
                    "ring": "stable",
                }
                connection.execute(sa.insert(schema.devices).values(**row))

    def restart(self) -> RoundRunner:
        """A new process on the same database and blobs."""
        ports = RunPorts(
            database=self.database,
            fence=None,
            blobs=self,
            nodes=self,
            outbox=self,
            strategy=self._make_strategy(),
            finisher=self,
            releaser=self,
            clock=self.clock,
        )
        self.runner = self._make_runner(self.plan, ports)
        self.runner.resume(self.initial, self.seed)
        return self.runner

    def head(self, sha256: bytes) -> Checkpoint:
        return Checkpoint.from_bytes(self.blobs.get_blob(sha256.hex()))

    # ---- ports ----

    def present(self) -> Mapping[str, int]:
        return {name: self.node_id(name) for name in self.devices if name not in self.absent}

    def node_id(self, device: str) -> int:
        return int.from_bytes(hashlib.sha256(device.encode()).digest()[:7], "big")

    def max_examples(self, device: str) -> int:
        return 1000

    def put_blob(self, data: bytes) -> str:
        self.fuse.burn("before blob")
        return self.blobs.put_blob(data)

    def get_blob(self, sha256: str) -> bytes:
        return self.blobs.get_blob(sha256)

    def delete_blob(self, sha256: str) -> None:
        self.blobs.delete_blob(sha256)

    def publish_blob(self, data: bytes, *, broadcast: bool = True) -> BlobRef:
        if broadcast:
            self.broadcast.append(data)
        return make_ref(data)[0]

    def send_invitation(self, invitation: Invitation) -> None:
        self.fuse.burn("before invitation")
        self.invitations.append(invitation)

    def send_order(self, device: str, order: Order) -> None:
        self.fuse.burn("before order")
        self.inbox.append((device, order))
        self.orders.append((device, order))

    def refine(
        self, params: NDArray[np.float32], buffers: NDArray[np.float32], seed: int
    ) -> NDArray[np.float32]:
        return params

    def finish(
        self, params: NDArray[np.float32], buffers: NDArray[np.float32], base: Checkpoint
    ) -> Checkpoint:
        return Checkpoint(params=params, buffers=buffers, ranges=base.ranges)

    def decide(self, candidate: Candidate) -> Decision:
        self.fuse.burn("before decision")
        self.candidates[candidate.round_number] = candidate
        return Decision(release_version=candidate.round_number)

    # ---- the world ----

    def deliver(self) -> None:
        """Every order that waits reaches its device, and what the device answers reaches the runner."""
        while self.inbox:
            self.deliver_one()

    def deliver_one(self) -> None:
        """The oldest order reaches its device; it stays in the queue if the process ends meanwhile."""
        name, order = self.inbox[0]
        if name not in self.absent:
            answer = self.devices[name].answer(order)
            if answer is not None:
                self.feed(name, order, answer)
        self.inbox.popleft()

    def feed(self, name: str, order: Order, answer: Message | Join) -> Receipt | None:
        if isinstance(answer, Join):
            self.runner.on_join(name, answer)
            return None
        self.runner.on_join(name, Join(order_id=order.order_id, accepted=True))
        receipt = self.send_up(name, answer)
        self.devices[name].receipts.append(receipt)
        return receipt

    def send_up(self, name: str, message: Message) -> Receipt:
        digest = hashlib.sha256(message.body).digest()
        arrival = Arrival(name, message.header, message.body, digest, len(message.body))
        return self.runner.on_updates([arrival])[0]

    def leave(self, name: str) -> None:
        self.absent.add(name)
        self.runner.on_node_lost(name)

    def come_back(self, name: str) -> None:
        self.absent.discard(name)
        self.runner.on_nodes_changed()

    def step(self) -> None:
        """One turn: what is due, then what travels, then time."""
        wakeup = self.runner.tick()
        if self.inbox:
            self.deliver()
        elif not self.runner.is_finished:
            self.clock.time = max(self.clock.time, min(self.runner.next_tick, self.clock.time + 3600))
            if wakeup == float("inf"):
                raise AssertionError("the run waits for nothing")

    def run(self, *, turns: int = 500) -> Checkpoint:
        """Until the run is finished."""
        for _ in range(turns):
            if self.runner.is_finished:
                return self.runner.head
            self.step()
        raise AssertionError(f"not finished after {turns} turns: {self.runner.view()}")

    def rows(self, table: sa.Table) -> list[Any]:
        with self.database.read() as connection:
            return list(connection.execute(sa.select(table)))


@contextmanager
def open_transaction(database: Database) -> Iterator[Connection]:
    """A transaction that no fuse counts."""
    with Database.transaction(database) as connection:
        yield connection
