"""Strikes: broken content of one's own costs, everything else does not, and there is a way back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud_server.db import devices as table
from cloud_server.db import schema
from cloud_server.db.audit import load_audit, verify_audit
from cloud_server.db.devices import APPROVED, QUARANTINED, DeviceRow
from cloud_server.registry import Registry
from cloud_server.screening import Refusal
from cloud_server.strikes import STRIKING, StrikePolicy, strikes_left
from tests.cloud.round_lab import Device, Lab, Message
from wire.errors import ConfigurationError
from wire.header import Header
from wire.messages import Order, Receipt, encode_body

LIMIT = 3
POLICY = StrikePolicy(limit=LIMIT, clean_rounds=2, probation_seconds=3600.0)
BAD = "d01"


class StrictLab(Lab):
    """A lab whose directory knows who is in quarantine."""

    def __init__(self, devices: int = 4, **options: Any) -> None:
        super().__init__(devices, **{"evaluate_every": 0, **options})
        self.plan = replace(self.plan, strikes=POLICY)
        self.restart()

    def present(self) -> Mapping[str, int]:
        with self.database.read() as connection:
            approved = {row.device for row in table.load_devices(connection) if row.status == APPROVED}
        return {name: node for name, node in super().present().items() if name in approved}

    def row(self, device: str = BAD) -> DeviceRow:
        with self.database.read() as connection:
            row = table.load_device(connection, device)
        assert row is not None
        return row

    def audit(self) -> list[tuple[str, dict[str, Any]]]:
        with self.database.read() as connection:
            verify_audit(connection)
            entries = [(entry.kind, json.loads(entry.body)) for entry in load_audit(connection)]
        return [entry for entry in entries if entry[0].startswith("device.")]

    def registry(self) -> Registry:
        return Registry(self.database, self.clock)


def undecodable(device: Device, order: Order) -> Message:
    return device.message(device.update(order, payload=b"?"), order)


# ---- into quarantine ---------------------------------------------------------------------------------------


def test_strikes_lead_to_quarantine_with_reason_audit_entry_and_count() -> None:
    lab = StrictLab(rounds=LIMIT + 1)
    lab.devices[BAD].behaviour = undecodable
    lab.run()
    row = lab.row()
    assert (row.status, row.strikes) == (QUARANTINED, LIMIT)
    assert row.reason == f"{LIMIT} strikes, the last for not_decodable"
    facts = [{"device": row.pseudonym, "refusal": "not_decodable", "strikes": n} for n in (1, 2, 3)]
    assert lab.audit() == [
        *(("device.struck", each) for each in facts),
        ("device.quarantined", facts[-1]),
    ]
    intake = lab.runner.intake
    assert intake.strikes_total == {"not_decodable": LIMIT}
    assert intake.quarantined_total == 1
    # It was asked in the rounds that it spoiled, and in none after them.
    assert [order.round_number for name, order in lab.orders if name == BAD] == [1, 2, 3]


def test_reply_of_a_quarantined_device_is_refused_with_a_word_and_costs_no_more() -> None:
    lab = StrictLab(rounds=1)
    lab.runner.tick()
    order = next(order for name, order in lab.inbox if name == BAD)
    message = lab.devices[BAD].honest(order)
    lab.registry().quarantine(BAD, "looked at")
    receipt = lab.send_up(BAD, message)
    assert (receipt.verdict, receipt.reason) == ("refused", Refusal.QUARANTINED)
    assert lab.send_up(BAD, message).reason == Refusal.QUARANTINED
    lab.devices[BAD].behaviour = lambda device, order: None
    lab.run()
    assert lab.rows(schema.rounds)[0].metrics["train_devices"] == 3
    assert lab.row().strikes == 0
    # Later it has no order that a row could end, and its messages leave none.
    late = lab.devices[BAD].update(order, update_id=b"z" * 16)
    before = len(lab.rows(schema.updates))
    assert lab.send_up(BAD, lab.devices[BAD].message(late, order)).reason == Refusal.QUARANTINED
    assert len(lab.rows(schema.updates)) == before
    assert lab.runner.intake.unbooked_total == {"quarantined": 1}


def test_large_reply_of_a_quarantined_device_is_not_put_into_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cloud_server.rounds.intake.INLINE_BYTES", 10)
    lab = StrictLab(rounds=1)
    lab.runner.tick()
    order = next(order for name, order in lab.inbox if name == BAD)
    lab.registry().quarantine(BAD)
    before = list(lab.blobs.keys("blobs"))
    assert lab.send_up(BAD, lab.devices[BAD].honest(order)).reason == Refusal.QUARANTINED
    assert list(lab.blobs.keys("blobs")) == before


@pytest.mark.parametrize("is_large", [False, True])
def test_reply_that_was_heard_before_its_device_was_revoked_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    if is_large:
        monkeypatch.setattr("cloud_server.rounds.intake.INLINE_BYTES", 10)
    lab = StrictLab(rounds=1)
    lab.runner.tick()
    order = next(order for name, order in lab.inbox if name == BAD)
    message = lab.devices[BAD].honest(order)
    lab.registry().revoke(BAD, "stolen")
    kept = list(lab.blobs.keys("blobs"))
    receipt = lab.send_up(BAD, message)
    assert (receipt.verdict, receipt.reason) == ("refused", Refusal.REVOKED)
    assert (lab.rows(schema.updates), lab.rows(schema.windows)) == ([], [])
    assert (list(lab.blobs.keys("blobs")), lab.row().strikes) == (kept, 0)


# ---- the way back ------------------------------------------------------------------------------------------


def test_approval_forgives_all_strikes() -> None:
    lab = StrictLab(rounds=LIMIT)
    lab.devices[BAD].behaviour = undecodable
    lab.run()
    lab.registry().approve(BAD)
    row = lab.row()
    assert (row.status, row.reason, row.strikes, row.struck_at, row.probation_at) == (
        APPROVED,
        "",
        0,
        0.0,
        0.0,
    )


def test_probation_lets_back_one_strike_below_the_limit() -> None:
    lab = StrictLab(rounds=LIMIT)
    lab.devices[BAD].behaviour = undecodable
    lab.run()
    registry = lab.registry()
    assert registry.end_probations() == []
    lab.clock.time += POLICY.probation_seconds + 1.0
    assert registry.end_probations() == [BAD]
    row = lab.row()
    assert (row.status, row.strikes, row.probation_at) == (APPROVED, LIMIT - 1, 0.0)
    assert lab.audit()[-1] == ("device.probation", {"device": row.pseudonym, "strikes": LIMIT - 1})
    assert registry.end_probations() == []


def test_quarantine_by_an_operator_ends_only_by_an_operator() -> None:
    lab = StrictLab(rounds=LIMIT)
    lab.devices[BAD].behaviour = undecodable
    lab.run()
    registry = lab.registry()
    registry.quarantine(BAD, "stolen, says the owner")
    lab.clock.time += 100 * POLICY.probation_seconds
    assert registry.end_probations() == []
    assert lab.row().status == QUARANTINED


def test_sound_updates_wear_strikes_off() -> None:
    """Spoils its first two updates and every fourth after that: never three strikes at once."""

    def seldom(device: Device, order: Order) -> Message:
        is_bad = order.kind == "train" and order.round_number in (1, 2, 6, 10)
        return undecodable(device, order) if is_bad else device.honest(order)

    lab = StrictLab(rounds=11, pause_seconds=1.0)
    lab.devices[BAD].behaviour = seldom
    lab.run()
    struck = [facts["strikes"] for kind, facts in lab.audit() if kind == "device.struck"]
    assert struck == [1, 2, 2, 2]
    assert lab.row().status == APPROVED


@pytest.mark.parametrize(
    ("strikes", "sound", "left"), [(0, 0, 0), (2, 1, 2), (2, 2, 1), (2, 3, 1), (2, 4, 0), (2, 400, 0)]
)
def test_so_many_sound_updates_wear_off_so_many_strikes(strikes: int, sound: int, left: int) -> None:
    assert strikes_left(strikes, sound, POLICY) == left


@pytest.mark.parametrize("name", ["limit", "clean_rounds", "probation_seconds"])
def test_policy_out_of_bounds_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        StrikePolicy(**{name: -1})
    assert caught.value.facts["name"] == name


# ---- what earns one ----------------------------------------------------------------------------------------

Spoiled = Callable[[Device, Order], Message]


def changed(**changes: Any) -> Spoiled:
    return lambda device, order: device.message(device.update(order, **changes), order)


@pytest.mark.parametrize(
    ("spoiled", "refusal"),
    [
        (undecodable, Refusal.NOT_DECODABLE),
        (changed(base_sha256=bytes(32)), Refusal.WRONG_BASE),
        (changed(round_number=9), Refusal.WRONG_ROUND),
        (changed(buffers=bytes(8)), Refusal.WRONG_SIZE),
        (changed(metrics={}), Refusal.MISSING_METRIC),
        (lambda device, order: replace(device.honest(order), body=b"\xff"), Refusal.MALFORMED),
        (lambda device, order: device.message(device.evaluation(order), order), Refusal.WRONG_KIND),
    ],
)
def test_broken_content_earns_one_strike_however_often_it_is_sent(spoiled: Spoiled, refusal: Refusal) -> None:
    lab = StrictLab(rounds=1)
    lab.runner.tick()
    order = next(order for name, order in lab.inbox if name == BAD)
    message = spoiled(lab.devices[BAD], order)
    reasons = {lab.send_up(BAD, message).reason for _ in range(10)}
    assert reasons == {str(refusal)}
    assert lab.row().strikes == 1


def test_strike_and_refusal_are_one_transaction() -> None:
    lab = StrictLab(rounds=1)
    lab.runner.tick()
    order = next(order for name, order in lab.inbox if name == BAD)
    message = undecodable(lab.devices[BAD], order)
    lab.fuse.steps.clear()
    lab.send_up(BAD, message)
    assert lab.fuse.steps == ["before commit", "after commit"]


# ---- what does not -----------------------------------------------------------------------------------------


def send_all(lab: Lab, name: str, messages: list[Message]) -> list[Receipt]:
    return [lab.send_up(name, message) for message in messages]


def test_hostile_broker_cannot_earn_a_device_a_strike() -> None:
    """All that it can do with what an honest device signed: again, late, in another order, in another session."""
    signed: list[Message] = []

    def withheld(device: Device, order: Order) -> Message | None:
        """In every other round the broker keeps what the device says, until the round is over."""
        signed.append(device.honest(order))
        return None if order.round_number % 2 else signed[-1]

    lab = StrictLab(4, rounds=6, evaluate_every=1, goal=3)
    lab.devices[BAD].behaviour = withheld
    reasons: set[str] = set()
    for _ in range(300):
        if lab.runner.is_finished:
            break
        lab.step()
        over = [each for each in signed if each.header.round_number < lab.runner.view().round_number]
        for receipt in send_all(lab, BAD, [*reversed(over), *over]):
            reasons.add(receipt.reason or receipt.verdict)
    # In a new session of the device, and the old one's once more.
    header = msgspec.structs.replace(signed[0].header, epoch=5, seq=1)
    send_all(lab, BAD, [Message(header, signed[0].body), *signed])
    assert reasons == {"duplicate", str(Refusal.ROUND_CLOSED)}
    assert {row.state for row in lab.rows(schema.updates) if row.device == BAD} == {"folded", "late"}
    # A body under another header, or one that was cut, no signature covers: it never comes so far.
    assert lab.row().strikes == 0
    assert lab.audit() == []
    assert lab.runner.intake.strikes_total == {}


def test_update_that_is_late_earns_no_strike_even_when_it_is_broken() -> None:
    lab = StrictLab(4, rounds=2, goal=3)
    lab.devices[BAD].behaviour = lambda device, order: None
    lab.run()
    order = next(order for name, order in lab.orders if name == BAD)
    assert lab.send_up(BAD, undecodable(lab.devices[BAD], order)).reason == Refusal.ROUND_CLOSED
    broken = replace(lab.devices[BAD].honest(order), body=b"\xff")
    assert lab.send_up(BAD, broken).reason == Refusal.MALFORMED
    assert lab.row().strikes == 0


def test_device_that_was_kept_from_a_newer_invitation_earns_no_strike() -> None:
    """Two rounds may begin at one head with another codec; a broker may hand over the order of the second alone."""
    lab = StrictLab(rounds=1)
    lab.runner.tick()
    order = next(order for name, order in lab.inbox if name == BAD)
    assert lab.send_up(BAD, changed(codec="sign")(lab.devices[BAD], order)).reason == Refusal.WRONG_CODEC
    assert lab.row().strikes == 0


def test_answer_to_an_order_of_another_device_costs_its_sender_alone() -> None:
    lab = StrictLab(rounds=1)
    lab.runner.tick()
    order = next(order for name, order in lab.inbox if name == BAD)
    message = lab.devices[BAD].honest(order)
    for _ in range(5):
        lab.send_up("d02", message)
    assert lab.send_up(BAD, message).verdict == "stored"
    assert (lab.row(BAD).strikes, lab.row("d02").strikes) == (0, 1)


def test_device_whose_id_another_one_took_earns_no_strike() -> None:
    lab = StrictLab(rounds=1)
    lab.runner.tick()
    orders = dict(lab.inbox)
    message = lab.devices[BAD].honest(orders[BAD])
    taken = lab.devices[BAD].update(orders[BAD]).update_id
    theft = changed(update_id=taken)(lab.devices["d02"], orders["d02"])
    assert lab.send_up("d02", theft).verdict == "stored"
    assert lab.send_up(BAD, message).reason == Refusal.FOREIGN_UPDATE
    assert lab.row(BAD).strikes == 0


def test_replies_that_could_never_count_leave_no_rows() -> None:
    lab = StrictLab(4, rounds=2, goal=3)
    lab.devices[BAD].behaviour = lambda device, order: None
    lab.run()
    order = next(order for name, order in lab.orders if name == BAD)
    device, before = lab.devices[BAD], len(lab.rows(schema.updates))
    for number in range(1, 31):
        update_id = number.to_bytes(16, "big")
        late = lab.send_up(BAD, device.message(device.update(order, update_id=update_id), order))
        assert late.reason == Refusal.ROUND_CLOSED
        stray = device.update(order, update_id=update_id[::-1], order_id=update_id)
        assert lab.send_up(BAD, device.message(stray, order)).reason == Refusal.UNKNOWN_ORDER
    assert len(lab.rows(schema.updates)) == before + 1
    assert lab.runner.intake.unbooked_total == {"round_closed": 29, "unknown_order": 30}


def test_orders_that_a_restored_cloud_has_forgotten_earn_no_strike() -> None:
    lab = StrictLab(rounds=1)
    lab.runner.tick()
    order = next(order for name, order in lab.inbox if name == BAD)
    forgotten = changed(order_id=b"f" * 16, payload=b"?")(lab.devices[BAD], order)
    assert lab.send_up(BAD, forgotten).reason == Refusal.UNKNOWN_ORDER
    assert lab.row().strikes == 0


def test_strikes_are_only_for_what_speaks_against_the_device() -> None:
    spared = {
        Refusal.UNKNOWN_ORDER,
        Refusal.FOREIGN_UPDATE,
        Refusal.WRONG_MODEL,
        Refusal.WRONG_CODEC,
        Refusal.QUARANTINED,
        Refusal.REVOKED,
        Refusal.REPLAYED,
        Refusal.ROUND_CLOSED,
        Refusal.TOO_STALE,
    }
    assert spared.isdisjoint(STRIKING)
    assert spared | STRIKING == set(Refusal)


def test_number_used_for_two_plaintexts_is_a_replay_and_no_strike() -> None:
    lab = StrictLab(rounds=1)
    lab.runner.tick()
    order = next(order for name, order in lab.inbox if name == BAD)
    device = lab.devices[BAD]
    first = device.honest(order)
    lab.send_up(BAD, first)
    other: Header = first.header
    second = Message(other, encode_body(device.update(order, np.ones(3, np.float32), update_id=b"t" * 16)))
    assert lab.send_up(BAD, second).reason == Refusal.REPLAYED
    assert lab.row().strikes == 0
