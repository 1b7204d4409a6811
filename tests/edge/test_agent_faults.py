"""A device on a bad network, with a ledger that knows what must be true whatever happens.

Every order leads to at most one update id; every id that the device ever made is stored once or still owed; nothing
that the cloud stored is stored twice; and when the network is good again, everything owed arrives.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from edge_agent.release.memory_slots import MemorySlots
from edge_agent.store.storage import MEMORY, open_database
from tests.edge.lab import Heard, Lab, feed
from wire.blobs import needed_chunks
from wire.errors import ShoalError
from wire.messages import Evaluation, Join, Need, Order, Update
from wire.transport import Packet
from wire.transport.faulty import FaultPlan

BAD = FaultPlan(lose=0.15, double=0.1, reorder=0.08, delay=0.08, truncate=0.04, corrupt=0.04, disconnect=0.03)
ROUNDS = 4


@dataclass
class Conductor:
    """Does what an aggregator does: asks again, hands out chunks, stores once, receipts."""

    lab: Lab
    orders: dict[bytes, Order] = field(default_factory=dict)
    stored: dict[bytes, Heard] = field(default_factory=dict)
    receipts: int = 0
    _read: int = 0

    def open_round(self, number: int) -> None:
        params = self.lab.bundle.checkpoint().params * (1 + number / 50)
        self.lab.cloud.invite(
            self.lab.cloud.head_of(params), round_number=number, seconds=600, chunk_bytes=1024
        )
        self.lab.cloud.broadcast()
        for kind in ("train", "evaluate"):
            order = self.lab.cloud.order("dev-1", kind)
            self.orders[order.order_id] = order

    def work(self) -> None:
        """Answers what was heard since the last time, and asks again for what is open."""
        heard = self.lab.cloud.heard[self._read :]
        self._read = len(self.lab.cloud.heard)
        for one in heard:
            match one.body:
                case Need():
                    self._hand_out(one.body)
                case Update() | Evaluation():
                    self._store(one)
        answered = {getattr(one.body, "order_id", b"") for one in self.stored.values()}
        for order in self.orders.values():
            if order.order_id not in answered and order.deadline > self.lab.time.now():
                self.lab.cloud.send_order("dev-1", order)

    def _hand_out(self, need: Need) -> None:
        cloud = self.lab.cloud
        if need.sha256 != cloud.invitation.head.sha256:
            return
        for index in needed_chunks(need.bitmap, len(cloud._chunks)):
            topic = cloud.topics.blob_chunk(need.sha256.hex(), index)
            cloud.transport.publish(Packet(topic, cloud._chunks[index]))

    def _store(self, one: Heard) -> None:
        assert isinstance(one.body, Update | Evaluation)
        known = self.stored.get(one.body.update_id)
        if known is None:
            self.stored[one.body.update_id] = one
        else:
            assert known.body == one.body, "one id names two updates"
        self.receipts += 1
        self.lab.cloud.receipt("dev-1", one, "duplicate" if known else "stored")


def quiet_errors(lab: Lab) -> None:
    """A chunk that was harmed on its way is refused by the cloud's reassembly, as it must be."""
    deliver = lab.cloud._deliver

    def guarded(event: object) -> None:
        try:
            deliver(event)  # type: ignore[arg-type]
        except ShoalError as error:
            lab.cloud.refused.append(type(error).__name__)

    lab.cloud.transport._deliver = guarded


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_lost_and_nothing_is_counted_twice_on_a_bad_network(lab: Lab, seed: int) -> None:
    print(f"seed {seed}")
    quiet_errors(lab)
    lab.broker.max_packet_bytes = 2048
    database, slots = open_database(MEMORY, clock=lab.time), MemorySlots(lab.shared)
    agent = lab.agent(database=database, slots=slots, plan=BAD, seed=seed)
    lab.run(30)
    feed(agent, lab.bundle, 30)
    conductor = Conductor(lab)
    for number in range(1, ROUNDS + 1):
        conductor.open_round(number)
        for _ in range(40):
            lab.run(10)
            conductor.work()
        if number == 2:
            lab.agents.clear()
            lab.broker.cut("dev-1", for_seconds=1e9)
            agent = lab.agent(database=database, slots=slots, plan=BAD, seed=seed + 100)
    lab.agents.clear()
    lab.broker.cut("dev-1", for_seconds=1e9)
    agent = lab.agent(database=database, slots=slots)
    for _ in range(40):
        lab.run(15)
        conductor.work()
    by_order: dict[bytes, set[bytes]] = {}
    for one in conductor.stored.values():
        assert isinstance(one.body, Update | Evaluation)
        by_order.setdefault(one.body.order_id, set()).add(one.body.update_id)
    assert set(by_order) <= set(conductor.orders)
    assert all(len(ids) == 1 for ids in by_order.values())
    # Heads of earlier rounds are not handed out any more, so their orders may have been given up.
    last = {order.order_id for order in conductor.orders.values() if order.round_number == ROUNDS}
    assert last <= set(by_order), "with a good network at the end, every order of the last round is answered"
    totals = agent.parts.outbox.totals()
    assert agent.parts.outbox.depth() == 0
    assert totals["stored"] == len(conductor.stored)
    assert sum(totals.values()) == totals["stored"]


def test_faults_do_happen_in_these_runs(lab: Lab) -> None:
    quiet_errors(lab)
    agent = lab.agent(plan=BAD, seed=1)
    lab.run(5)
    feed(agent, lab.bundle, 20)
    conductor = Conductor(lab)
    for number in range(1, 4):
        conductor.open_round(number)
        for _ in range(4):
            lab.run(10)
            conductor.work()
    faults = agent._transport.faults  # type: ignore[attr-defined]
    assert {"lose", "double"} <= set(faults)
    assert sum(faults.values()) > 10
    assert lab.cloud.of(Join)
