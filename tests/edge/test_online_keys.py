"""The aggregator's online keys on a device: read strictly, rotated by a release check, kept through a restart."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cloud_server.keys import CloudKeys
from edge_agent.store.storage import MEMORY, open_database
from edge_agent.uplink.online_keys import ONLINE_KEYS_FACT, OnlineKeys
from tests.edge.lab import FLEET, TENANT, Lab
from wire.errors import ReleaseError
from wire.primitives import SigningKey

LISTED = CloudKeys.from_seed(b"online keys").online_json(tenant=TENANT, fleet=FLEET)


def rotate(lab: Lab) -> SigningKey:
    """Another order key in `keys/online.json`; returns the one that is not listed any more."""
    stolen = lab.cloud.keys.order
    newer = CloudKeys.from_seed(b"after the theft")
    lab.cloud.keys = replace(lab.cloud.keys, order=newer.order)
    lab.cloud.repository.set_online_keys(lab.cloud.keys.online_json(tenant=TENANT, fleet=FLEET))
    return stolen


def test_online_keys_come_back_as_they_were_written() -> None:
    keys = OnlineKeys.from_json(LISTED)
    assert OnlineKeys.from_json(keys.to_json()) == keys
    assert (keys.tenant, keys.fleet) == (TENANT, FLEET)


@pytest.mark.parametrize(
    "change",
    [
        lambda listed: listed.pop("orders"),
        lambda listed: listed.update(orders=[]),
        lambda listed: listed.update(more=1),
        lambda listed: listed["orders"][0].update(id="00" * 8),
        lambda listed: listed["kem"][0].update(public="zz"),
    ],
)
def test_online_keys_that_are_not_what_they_should_be_are_refused(change: object) -> None:
    listed = json.loads(LISTED)
    change(listed)  # type: ignore[operator]
    with pytest.raises(ReleaseError):
        OnlineKeys.from_json(json.dumps(listed).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{" * 100_000])
def test_bytes_that_are_no_list_of_keys_are_refused(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        OnlineKeys.from_json(data)


def test_device_that_restarts_offline_trusts_the_keys_of_its_last_check(lab: Lab) -> None:
    database = open_database(MEMORY, clock=lab.time)
    before = lab.agent(database=database)
    lab.run(2)
    stolen = rotate(lab)
    lab.cloud.announce(1)  # signed by the key that the device does not know yet: it checks
    lab.run(60)
    # The process ends as by a power cut: nobody says goodbye, and the repository is out of reach afterwards.
    lab.agents.remove(before)
    after = lab.agent(database=database, source=lambda path: None, identity=before.identity)
    lab.run(2)
    refused = after.rejected_total
    lab.cloud.announce(1)
    lab.run(2)
    assert after.rejected_total == refused
    topic = lab.cloud.topics.announcement("stable")
    lab.cloud.say(lab.cloud.announcement(1), device="*", topic=topic, key=stolen)
    lab.run(2)
    assert after.rejected_total == refused + 1


def test_keys_of_enrolment_are_not_written_again(lab: Lab) -> None:
    agent = lab.agent()
    lab.run(2)
    assert agent.parts.database.fact(ONLINE_KEYS_FACT) is None


def test_kept_keys_that_cannot_be_read_leave_those_of_enrolment(lab: Lab) -> None:
    database = open_database(MEMORY, clock=lab.time)
    database.set_fact(ONLINE_KEYS_FACT, b"{}")
    agent = lab.agent(database=database, source=lambda path: None)
    assert agent.parts.speaker.keys == OnlineKeys.of_enrolment(agent.identity)
