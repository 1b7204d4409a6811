"""Replies that are committed together: one commit for all, and each of them judged as if it had come alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from cloud_server.db import rounds as books
from cloud_server.rounds.intake import Arrival
from cloud_server.rounds.state import Members, Standing
from tests.cloud.round_lab import RUN, Lab, Message

DEVICES = 5


def arrival(device: str, message: Message) -> Arrival:
    return Arrival(
        device, message.header, message.body, hashlib.sha256(message.body).digest(), len(message.body)
    )


def asked(lab: Lab) -> list[Arrival]:
    """What every device of the round's cohort answers."""
    lab.runner.tick()
    return [arrival(name, lab.devices[name].honest(order)) for name, order in lab.inbox]


def stored(lab: Lab) -> set[bytes]:
    with lab.database.read() as connection:
        return {row.update_id for row in books.load_updates(connection, RUN, 1, "train")}


def test_replies_that_come_together_are_one_commit() -> None:
    lab = Lab(DEVICES, rounds=1)
    arrivals = asked(lab)
    commits: list[float] = []
    lab.database.on_commit = commits.append
    receipts = lab.runner.on_updates(arrivals)
    assert len(commits) == 1
    assert [receipt.verdict for receipt in receipts] == ["stored"] * DEVICES
    assert [receipt.transfer for receipt in receipts] == [each.transfer_sha256 for each in arrivals]
    assert stored(lab) == {receipt.update_id for receipt in receipts}
    lab.runner.tick()
    assert lab.runner.view().moved == 1


def test_same_reply_twice_at_once_is_stored_once_and_answered_twice() -> None:
    lab = Lab(DEVICES, rounds=1)
    first, *_ = asked(lab)
    receipts = lab.runner.on_updates([first, first])
    assert [receipt.verdict for receipt in receipts] == ["stored", "duplicate"]
    assert stored(lab) == {receipts[0].update_id}


def test_two_answers_to_one_order_at_once_are_one_answer() -> None:
    lab = Lab(DEVICES, rounds=1)
    lab.runner.tick()
    name, order = lab.inbox[0]
    device = lab.devices[name]
    update = device.update(order)
    other = device.update(order, update_id=bytes(16))
    receipts = lab.runner.on_updates(
        [arrival(name, device.message(update, order)), arrival(name, device.message(other, order))]
    )
    assert [(each.verdict, each.reason) for each in receipts] == [
        ("stored", ""),
        ("refused", "already_answered"),
    ]
    assert stored(lab) == {update.update_id}


def test_reply_that_is_none_takes_nothing_from_those_beside_it() -> None:
    lab = Lab(DEVICES, rounds=1)
    arrivals = asked(lab)
    arrivals[1] = replace(arrivals[1], body=b"\xff")
    receipts = lab.runner.on_updates(arrivals)
    assert [receipt.verdict for receipt in receipts] == ["stored", "refused", *["stored"] * (DEVICES - 2)]
    assert len(stored(lab)) == DEVICES - 1


def test_members_of_a_large_cohort_change_one_by_one() -> None:
    names = [f"d{number}" for number in range(1000)]
    members = Members(dict.fromkeys(names, Standing.WAITING))
    plain = dict(members)
    for number, name in enumerate(names + names[::-3]):
        standing = Standing.ACCEPTED if number % 3 else Standing.ANSWERED
        before, members = members, members.changed(name, standing)
        assert before[name] is plain[name]
        plain[name] = standing
    assert dict(members) == plain
    assert list(members) == names
    assert "nobody" not in members
