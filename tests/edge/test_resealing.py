"""An update that waits is never said to a key that the cloud lists no longer: the same plaintext, another number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloud_server.keys import CloudKeys
from edge_agent.agent import Agent
from edge_agent.release.memory_slots import MemorySlots
from edge_agent.store.storage import MEMORY, open_database
from tests.edge.lab import FLEET, TENANT, Heard, Lab, feed
from wire.messages import Join, Update
from wire.primitives import KemPrivateKey


def owed_update(lab: Lab, agent: Agent) -> Heard:
    """One update that the cloud has heard and not acknowledged."""
    lab.run(2)
    feed(agent, lab.bundle)
    lab.cloud.invite(lab.cloud.head_of(lab.bundle.checkpoint().params), seconds=900.0)
    lab.cloud.broadcast()
    lab.settle()
    lab.cloud.order("dev-1")
    lab.run(3)
    assert agent.parts.outbox.depth() == 1
    return lab.cloud.of(Update)[-1]


def rotate(lab: Lab, *, is_stolen: bool) -> KemPrivateKey:
    """Lists a new key to seal to; a stolen one is listed no longer, and the cloud opens nothing with it."""
    newer = CloudKeys.from_seed(b"another KEM key").kem[0]
    older = () if is_stolen else lab.cloud.keys.kem
    lab.cloud.keys = replace(lab.cloud.keys, kem=(newer, *older))
    lab.cloud.repository.set_online_keys(lab.cloud.keys.online_json(tenant=TENANT, fleet=FLEET))
    return newer


def check_keys(lab: Lab, agent: Agent) -> None:
    """A release comes, so the device looks at the metadata, and finds the keys of today."""
    lab.cloud.release(lab.cloud.candidate(lab.bundle.checkpoint().params * 2), 2)
    lab.run(5)
    assert agent.parts.speaker.keys.kem[0][0] == lab.cloud.keys.kem[0].key_id


def test_update_that_waits_is_sealed_anew_when_its_key_was_stolen(lab: Lab) -> None:
    agent = lab.agent()
    first = owed_update(lab, agent)
    newer = rotate(lab, is_stolen=True)
    check_keys(lab, agent)
    last = lab.cloud.of(Update)[-1]
    assert last.body == first.body
    assert last.transfer != first.transfer
    assert (last.header.epoch, last.header.seq) > (first.header.epoch, first.header.seq)
    (row,) = agent.parts.outbox.pending()
    assert (row.kem_key_id, row.transfer) == (newer.key_id, last.transfer)
    lab.cloud.receipt("dev-1", first)
    lab.settle()
    assert agent.parts.outbox.depth() == 1
    lab.cloud.receipt("dev-1", last, "duplicate")
    lab.settle()
    assert agent.parts.outbox.totals()["stored"] == 1


def test_update_is_not_sealed_anew_while_its_key_is_listed_beside_a_newer_one(lab: Lab) -> None:
    agent = lab.agent()
    first = owed_update(lab, agent)
    rotate(lab, is_stolen=False)
    check_keys(lab, agent)
    lab.run(120)
    assert {heard.transfer for heard in lab.cloud.of(Update)} == {first.transfer}
    assert len(lab.cloud.of(Update)) > 2


def test_restarted_device_knows_what_its_updates_are_sealed_to(lab: Lab) -> None:
    """The key was dropped while the device was off: nothing is sent to it after the start."""
    database, slots = open_database(MEMORY, clock=lab.time), MemorySlots(lab.shared)
    agent = lab.agent(database=database, slots=slots)
    first = owed_update(lab, agent)
    lab.agents.clear()
    lab.broker.cut("dev-1", for_seconds=1e9)
    rotate(lab, is_stolen=True)
    heard, refused = len(lab.cloud.of(Update)), len(lab.cloud.refused)
    again = lab.agent(database=database, slots=slots, identity=agent.identity)
    check_keys(lab, again)
    lab.run(60)
    later = lab.cloud.of(Update)[heard:]
    assert later
    assert {item.transfer for item in later}.isdisjoint({first.transfer})
    assert all(item.body == first.body for item in later)
    # What it said before it knew better was to a key that opens nothing any more.
    assert set(lab.cloud.refused[refused:]) <= {"recipient"}


def test_withdrawn_update_leaves_the_queue_and_others_stay(lab: Lab) -> None:
    agent = lab.agent()
    first = owed_update(lab, agent)
    outgoing = agent.parts.outgoing
    (row,) = agent.parts.outbox.pending()
    packets = agent.parts.speaker.uploads(row.sealed or b"", 1, max_packet_bytes=131_072)
    outgoing.upload(row.update_id, packets)
    outgoing.upload(b"another", packets)
    outgoing.withdraw(row.update_id)
    before = len(lab.cloud.of(Update))
    outgoing.pump()
    lab.settle()
    assert len(lab.cloud.of(Update)) == before + 1
    assert lab.cloud.of(Update)[-1].transfer == first.transfer


@pytest.mark.parametrize("when", ["while it runs", "at a start"])
def test_cloud_is_told_of_an_update_that_the_disk_destroyed(lab: Lab, when: str) -> None:
    database, slots = open_database(MEMORY, clock=lab.time), MemorySlots(lab.shared)
    agent = lab.agent(database=database, slots=slots)
    first = owed_update(lab, agent)
    assert isinstance(first.body, Update)
    with database.transaction() as connection:
        connection.execute("UPDATE outbox SET body = x'00'")
    if when == "at a start":
        lab.agents.clear()
        lab.broker.cut("dev-1", for_seconds=1e9)
        agent = lab.agent(database=database, slots=slots, identity=agent.identity)
    lab.run(120)
    declined = [heard.body for heard in lab.cloud.of(Join) if not heard.body.accepted]  # type: ignore[attr-defined]
    assert [(join.order_id, join.reason) for join in declined] == [  # type: ignore[attr-defined]
        (first.body.order_id, "the update was destroyed: damaged on disk")
    ]
    assert agent.parts.outbox.totals()["destroyed"] == 1
    assert agent.state.uploads == ()
