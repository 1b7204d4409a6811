"""Masked cohorts in groups: no message is larger than a broker carries, and each group stands for itself."""

from __future__ import annotations

import numpy as np
import pytest

from cloud_server.db import schema
from cloud_server.secure.book import MaskBook
from cloud_server.secure.desk import NOT_UNMASKED
from cloud_server.secure.groups import MAX_MESSAGE_BYTES, GroupBooks, roster_bytes, split_cohort
from tests.cloud.masked_lab import ORDER, MaskedLab
from tests.cloud.test_masked_round import MaskedRun
from wire.errors import QuorumError, StorageError, UpdateError
from wire.messages import MaskKeys, MaskMember, MaskOpened, MaskPeer, MaskQuestion, MaskRoster, encode_body

LONG = [f"gateway-{'x' * 50}-{number:05d}"[:64] for number in range(1100)]
SHORT = [f"d{number:03d}" for number in range(1024)]
SMALL = 950
"""Bytes of a message that has room for three to six devices."""


@pytest.mark.parametrize(
    ("devices", "count"),
    [(SHORT, 1), (SHORT[:3], 1), (LONG[:300], 1), (LONG[:1024], 2), (LONG, 2)],
    ids=["short names", "three", "long names", "many long names", "above 1024"],
)
def test_cohort_is_split_only_where_messages_would_be_too_large(devices: list[str], count: int) -> None:
    groups = split_cohort(devices, b"seed", dropout=0.2, colluding=0.1)
    assert len(groups) == count
    assert sorted(device for group in groups for device in group.devices) == sorted(devices)
    sizes = [len(group.devices) for group in groups]
    assert max(sizes) - min(sizes) <= 1
    assert all(roster_bytes(group) <= MAX_MESSAGE_BYTES for group in groups)


def test_bound_of_a_roster_is_close_to_what_it_takes() -> None:
    for devices in (
        SHORT,
        LONG[:300],
        [f"{name}{'y' * (number % 40)}" for number, name in enumerate(SHORT[:200])],
    ):
        (group,) = split_cohort(devices, b"seed", dropout=0.2, colluding=0.0)
        longest = sorted(group.devices, key=len)[-group.layout.degree :]
        body = MaskRoster(
            order_id=ORDER,
            members=tuple(MaskMember(device, bytes(32)) for device in group.devices),
            peers=tuple(MaskPeer(device, bytes(32), bytes(32), bytes(32), bytes(64)) for device in longest),
        )
        size = len(encode_body(body))
        assert size <= roster_bytes(group) <= 1.02 * size + 600


def test_company_follows_from_a_secret() -> None:
    one, same, other = (split_cohort(LONG, seed, dropout=0.2, colluding=0.0) for seed in (b"a", b"a", b"b"))
    assert one == same
    assert set(one[0].devices) != set(other[0].devices)


def test_names_that_no_broker_carries_are_said_when_the_round_is_planned() -> None:
    with pytest.raises(QuorumError, match="broker"):
        split_cohort(LONG[:9], b"seed", dropout=0.0, colluding=0.0, message_bytes=300)


# --- rounds in groups ---


def groups_of(lab: MaskedRun) -> list[list[str]]:
    kept = lab.rows(schema.rounds)[0].config["mask_groups"]
    return [[device for device, _ in group["members"]] for group in kept]


def mean_of_groups(lab: MaskedRun, groups: list[list[str]]) -> np.ndarray:
    order = lab.first_order()
    means = [lab.mean_of(group, order).astype(np.float64) * len(group) for group in groups]
    return np.asarray(sum(means) / sum(map(len, groups)), np.float32)


def test_round_in_groups_moves_the_head_by_the_mean_of_all() -> None:
    lab = MaskedRun(devices=11, rounds=1, dropout=0.0, message_bytes=SMALL)
    head = lab.run()
    groups = groups_of(lab)
    assert sorted(map(len, groups)) == [5, 6]
    assert np.array_equal(head.params, lab.initial.params + mean_of_groups(lab, groups))
    assert {order.masking.members for _, order in lab.orders if order.masking is not None} == {5, 6}


def test_group_that_cannot_be_unmasked_costs_its_own_updates_only() -> None:
    lab = MaskedRun(devices=9, rounds=1, dropout=0.0, message_bytes=SMALL, mask_seconds=20.0, quorum=3)
    lab.runner.tick()
    lost = groups_of(lab)[1]
    lab.mute = dict.fromkeys(lost[:1], MaskQuestion)
    head = lab.run()
    left = [group for group in groups_of(lab) if group != lost]
    assert np.array_equal(head.params, lab.initial.params + mean_of_groups(lab, left))
    states = {row.device: (row.state, row.reason) for row in lab.rows(schema.updates) if row.kind == "train"}
    assert {states[device] for device in lost} == {("discarded", NOT_UNMASKED)}
    assert {states[device][0] for group in left for device in group} == {"folded"}


def test_group_in_which_nobody_has_company_is_not_waited_for() -> None:
    """Two of three never send keys: the third cannot mask, and the other groups go on at once."""
    lab = MaskedRun(devices=9, rounds=1, dropout=0.0, message_bytes=SMALL, mask_seconds=20.0, quorum=3)
    lab.runner.tick()
    lost = groups_of(lab)[0]
    lab.mute = dict.fromkeys(lost[:2], MaskRoster)
    lab.run()
    left = [group for group in groups_of(lab) if group != lost]
    assert np.array_equal(lab.runner.head.params, lab.initial.params + mean_of_groups(lab, left))


def test_round_of_which_too_little_can_be_unmasked_fails() -> None:
    lab = MaskedRun(devices=9, rounds=1, dropout=0.0, message_bytes=SMALL, mask_seconds=20.0, quorum=7)
    lab.runner.tick()
    lab.mute = dict.fromkeys([group[0] for group in groups_of(lab)[:1]], MaskQuestion)
    for _ in range(80):
        lab.step()
        if "failed" in lab.states():
            break
    assert lab.states()[0] == "failed"
    assert lab.runner.head.sha256 == lab.initial.sha256


@pytest.mark.parametrize("phase", ["keys", "shares", "training", "unmasking"])
def test_restart_in_a_phase_of_groups_gives_the_same_head(phase: str) -> None:
    wanted = MaskedRun(devices=7, rounds=1, dropout=0.0, message_bytes=SMALL).run()
    lab = MaskedRun(devices=7, rounds=1, dropout=0.0, message_bytes=SMALL)
    for _ in range(50):
        lab.runner.tick()
        if lab.states()[-1] == phase:
            break
        lab.deliver()
    assert lab.states() == [phase]
    lab.messages.clear()
    lab.restart()
    assert lab.run().sha256 == wanted.sha256


# --- books ---


def test_books_come_back_as_they_were_written() -> None:
    labs = [MaskedLab(3, seed=seed, strangers=()) for seed in (1, 2)]
    one = GroupBooks([labs[0].book.group])
    for name in labs[0].names:
        one.add(name, labs[0].devices[name].keys())
    again = GroupBooks([labs[0].book.group])
    again.read(one.to_bytes())
    assert again.to_bytes() == one.to_bytes()
    assert again.close_keys() == frozenset(labs[0].names)
    for damaged in (b"", one.to_bytes()[:-1], MaskBook(labs[1].book.group).to_bytes()):
        with pytest.raises(StorageError):
            again.read(damaged)


def test_device_of_no_group_is_not_heard() -> None:
    lab = MaskedLab(3)
    one = GroupBooks([lab.book.group])
    keys: MaskKeys = lab.devices[lab.names[0]].keys()
    with pytest.raises(UpdateError):
        one.add("stranger", keys)
    with pytest.raises(UpdateError):
        one.add("stranger", MaskOpened(order_id=ORDER, pieces=()))
