"""A cloud that comes back from a backup is given what it had acknowledged and lost; one that starts again is not."""

from __future__ import annotations

import pytest

from edge_agent.agent import Agent
from edge_agent.release.memory_slots import MemorySlots
from edge_agent.store.storage import MEMORY, open_database
from edge_agent.uplink.hearing import RESTORED_EPOCHS
from tests.edge.lab import Heard, Lab, feed
from wire.messages import Update


def acknowledged(lab: Lab, agent: Agent, *, row: int, durable: int = 0) -> Heard:
    """One update that the cloud committed under this number, and said so."""
    lab.run(2)
    feed(agent, lab.bundle)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params), seconds=900.0)
    lab.cloud.broadcast()
    lab.settle()
    lab.cloud.order("dev-1")
    lab.run(3)
    heard = lab.cloud.of(Update)[-1]
    lab.cloud.receipt("dev-1", heard, row=row, durable=durable)
    lab.settle()
    assert agent.parts.outbox.depth() == 0
    return heard


def say_something(lab: Lab) -> None:
    lab.cloud.announce(1)
    lab.run(30)


def test_restored_cloud_is_offered_what_is_in_no_backup(lab: Lab) -> None:
    agent = lab.agent()
    first = acknowledged(lab, agent, row=7)
    lab.cloud.epoch += RESTORED_EPOCHS
    say_something(lab)
    again = lab.cloud.of(Update)[-1]
    assert again.body == first.body
    assert again.header.seq > first.header.seq
    assert agent.parts.outbox.totals()["stored"] == 0
    lab.cloud.receipt("dev-1", again, "refused", reason="round_closed")
    lab.settle()
    totals = agent.parts.outbox.totals()
    assert (totals["stored"], totals["refused"], agent.parts.outbox.depth()) == (0, 1, 0)


@pytest.mark.parametrize(
    ("row", "durable", "epochs"), [(7, 0, 1), (7, 7, RESTORED_EPOCHS), (0, 0, RESTORED_EPOCHS)]
)
def test_nothing_is_offered_again_without_need(lab: Lab, row: int, durable: int, epochs: int) -> None:
    agent = lab.agent()
    acknowledged(lab, agent, row=row, durable=durable)
    said = len(lab.cloud.of(Update))
    lab.cloud.epoch += epochs
    say_something(lab)
    assert len(lab.cloud.of(Update)) == said
    assert agent.parts.outbox.totals()["stored"] == 1


def test_copy_goes_when_a_receipt_for_something_else_says_that_it_is_durable(lab: Lab) -> None:
    agent = lab.agent()
    heard = acknowledged(lab, agent, row=7)
    assert agent.parts.outbox.copies() == 1
    lab.cloud.receipt("dev-1", heard, "duplicate", row=7, durable=8)
    lab.settle()
    assert agent.parts.outbox.copies() == 0


def test_device_that_was_off_while_the_cloud_was_restored_notices(lab: Lab) -> None:
    database, slots = open_database(MEMORY, clock=lab.time), MemorySlots(lab.shared)
    agent = lab.agent(database=database, slots=slots)
    first = acknowledged(lab, agent, row=7)
    lab.agents.clear()
    lab.broker.cut("dev-1", for_seconds=1e9)
    lab.cloud.epoch += 3 * RESTORED_EPOCHS
    lab.agent(database=database, slots=slots, identity=agent.identity)
    say_something(lab)
    later = lab.cloud.of(Update)[-1]
    assert later.body == first.body
    assert later.transfer != first.transfer


def test_copy_ends_with_its_deadline(lab: Lab) -> None:
    agent = lab.agent()
    acknowledged(lab, agent, row=7)
    lab.run(900 + 600 + 120)
    assert agent.parts.outbox.copies() == 0
    lab.cloud.epoch += RESTORED_EPOCHS
    said = len(lab.cloud.of(Update))
    say_something(lab)
    assert len(lab.cloud.of(Update)) == said
