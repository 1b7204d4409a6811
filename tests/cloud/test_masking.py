"""Masked rounds between the devices' part and the cloud's: exact sums, drop-outs at every phase, liars, strangers."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_server.secure.book import MaskBook
from cloud_server.secure.layout import Layout, choose_layout
from tests.cloud.masked_lab import ORDER, MaskedLab
from wire.errors import EnvelopeError, MessageError, QuorumError, RoundError, StorageError, UpdateError
from wire.messages import MaskPeer


def played(lab: MaskedLab, *, lost: tuple[int, int, int, int] = (0, 0, 0, 0)) -> MaskedLab:
    """A whole round in which so many devices vanish before each phase."""
    rng, left = random.Random(7), lab.names
    for phase, count in zip((lab.announce, lab.share, lab.deliver, lab.tell), lost, strict=True):
        left = sorted(rng.sample(left, len(left) - count))
        going = phase(left)
        left = sorted(going) if going is not None else left
    return lab


# --- sums ---


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(3, 14),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_sum_is_exact_whoever_drops_out(count: int, seed: int, data: st.DataObject) -> None:
    """As long as each secret keeps enough holders; in a complete graph that is one more than the threshold."""
    lab = MaskedLab(count, seed=seed, layout=Layout(count - 1, count // 2 + 1 if count > 3 else 2))
    spare = count - 1 - lab.terms.threshold
    lost = []
    for _ in range(4):
        lost.append(data.draw(st.integers(0, spare)))
        spare -= lost[-1]
    lab = played(lab, lost=(lost[0], lost[1], lost[2], lost[3]))
    assert np.array_equal(lab.unmask(), lab.expected())


@pytest.mark.parametrize(
    "lost", [(6, 0, 0, 0), (0, 6, 0, 0), (0, 0, 6, 0), (0, 0, 0, 6), (2, 2, 1, 1)], ids=str
)
def test_sum_is_exact_in_a_sparse_graph(lost: tuple[int, int, int, int]) -> None:
    lab = played(MaskedLab(40, layout=Layout(20, 11)), lost=lost)
    assert 0 < lab.terms.degree < 39
    assert np.array_equal(lab.unmask(), lab.expected())


def test_masked_update_says_nothing_by_itself() -> None:
    """Its numbers are spread over the whole ring, whatever the update was."""
    lab = MaskedLab(5, size=20_000, layout=Layout(4, 3))
    lab.vectors = {name: np.zeros(20_000, lab.ring.dtype) for name in lab.names}
    played(lab)
    top = 2.0**lab.ring.bits
    for masked in lab.masked.values():
        assert abs(masked.astype(float).mean() / top - 0.5) < 0.01
    assert not lab.unmask().any()


def test_round_of_too_few_survivors_is_not_unmasked() -> None:
    lab = played(MaskedLab(8, layout=Layout(7, 5)), lost=(0, 0, 0, 4))
    with pytest.raises(RoundError, match="shares"):
        lab.unmask()


def test_devices_without_enough_neighbours_are_left_out() -> None:
    lab = MaskedLab(8, layout=Layout(7, 5))
    assert lab.announce(lab.names[:5]) == frozenset()


def test_missing_and_foreign_updates_are_refused() -> None:
    lab = played(MaskedLab(5, layout=Layout(4, 3)))
    first = lab.names[0]
    kept = lab.masked.pop(first)
    lab.masked[first] = kept
    del lab.masked[first]
    lab.book.delivered = frozenset(lab.names)
    from cloud_server.secure.unmask import unmask

    with pytest.raises(RoundError, match="missing"):
        unmask(lab.book, list(lab.masked.items()), lab.ring, lab.size)
    with pytest.raises(RoundError, match="not one of the sum"):
        unmask(lab.book, [*lab.masked.items(), ("stranger", kept)], lab.ring, lab.size)
    with pytest.raises(RoundError, match="not one of the sum"):
        unmask(lab.book, [*lab.masked.items(), *lab.masked.items()], lab.ring, lab.size)


# --- liars ---


def with_lies(lab: MaskedLab, liars: list[str]) -> None:
    for name in liars:
        told = lab.book.opened.pop(name)
        pieces = tuple(bytes(byte ^ 0x55 for byte in piece) for piece in told.pieces)
        lab.book.opened[name] = msgspec.structs.replace(told, pieces=pieces)


def test_wrong_shares_of_one_device_are_passed_by() -> None:
    lab = played(MaskedLab(8, layout=Layout(7, 5)), lost=(0, 0, 1, 0))
    with_lies(lab, [sorted(lab.book.opened)[2]])
    assert np.array_equal(lab.unmask(), lab.expected())


def test_wrong_shares_of_many_cost_the_round_and_never_falsify_it() -> None:
    lab = played(MaskedLab(8, layout=Layout(7, 5)))
    with_lies(lab, sorted(lab.book.opened)[:4])
    with pytest.raises(RoundError, match="do not fit together"):
        lab.unmask()


def test_piece_that_does_not_open_is_a_share_less() -> None:
    lab = MaskedLab(6, layout=Layout(5, 3))
    lab.announce()
    liar, victim = lab.names[0], lab.names[1]
    lab.share(lab.names)
    place = lab.book.group.place_of(liar, victim)
    pieces = list(lab.book.shares[liar].pieces)
    pieces[place] = bytes(len(pieces[place]))
    lab.book.shares[liar] = msgspec.structs.replace(lab.book.shares[liar], pieces=tuple(pieces))
    lab.deliver(lab.names)
    lab.tell(lab.names)
    assert lab.book.opened[victim].pieces[lab.book.group.place_of(victim, liar)] == b""
    assert np.array_equal(lab.unmask(), lab.expected())


# --- who is heard ---


def test_device_outside_the_roster_is_not_heard() -> None:
    lab = MaskedLab(4, strangers=["sybil"], layout=Layout(3, 2))
    with pytest.raises(UpdateError, match="roster"):
        lab.book.add_keys("sybil", lab.devices["sybil"].keys())
    with pytest.raises(UpdateError, match="cannot be used"):
        lab.book.add_keys(lab.names[0], lab.devices["sybil"].keys())
    lab.announce()
    with pytest.raises(UpdateError, match="roster"):
        lab.book.add_shares(
            "sybil", lab.devices[lab.names[0]].share(lab.book.roster_for(lab.names[0], ORDER))
        )


def test_device_refuses_a_roster_with_strangers_in_it() -> None:
    """A cloud that lies about who takes part: the order named the hash of another roster."""
    lab = MaskedLab(4, layout=Layout(3, 2))
    lab.announce()
    device, roster = lab.devices[lab.names[0]], lab.book.roster_for(lab.names[0], ORDER)
    member = roster.members[2]
    forged = (*roster.members[:2], type(member)("sybil", b"s" * 32), *roster.members[3:])
    with pytest.raises(MessageError, match="not the one"):
        device.share(msgspec.structs.replace(roster, members=forged))


def test_device_refuses_keys_that_their_owner_did_not_sign() -> None:
    """A broker or cloud in the middle that puts its own keys in a neighbour's place."""
    lab, other = MaskedLab(4, layout=Layout(3, 2)), MaskedLab(4, seed=1, layout=Layout(3, 2), round_number=2)
    lab.announce()
    other.announce()
    name = lab.names[0]
    roster = lab.book.roster_for(name, ORDER)
    earlier = other.book.roster_for(name, ORDER)
    swapped = msgspec.structs.replace(roster.peers[0], mask_key=b"m" * 32)
    with pytest.raises(EnvelopeError):
        lab.devices[name].share(msgspec.structs.replace(roster, peers=(swapped, *roster.peers[1:])))
    with pytest.raises(EnvelopeError):
        # Signed by the right device, for another round.
        lab.devices[name].share(msgspec.structs.replace(roster, peers=earlier.peers))


def test_key_that_is_used_twice_is_refused_on_both_sides() -> None:
    lab = MaskedLab(4, layout=Layout(3, 2))
    one, two = lab.names[:2]
    lab.book.add_keys(one, lab.devices[one].keys())
    copied = lab.device(two, random.Random(f"1 {one}"))
    with pytest.raises(UpdateError, match="used twice"):
        lab.book.add_keys(two, copied.keys())
    lab = MaskedLab(4, layout=Layout(3, 2))
    lab.devices[two] = lab.device(two, random.Random(f"1 {one}"))
    lab.book.keys = {name: lab.devices[name].keys() for name in lab.names}
    with pytest.raises(MessageError, match="used twice"):
        lab.devices[lab.names[3]].share(lab.book.roster_for(lab.names[3], ORDER))


def test_secrets_mask_one_vector_only() -> None:
    lab = played(MaskedLab(4, layout=Layout(3, 2)))
    name = lab.names[0]
    with pytest.raises(MessageError, match="one update"):
        lab.devices[name].mask(lab.vectors[name])


def test_device_answers_one_question_only() -> None:
    """Both secrets of a neighbour would unmask it."""
    lab = played(MaskedLab(6, layout=Layout(5, 3)), lost=(0, 0, 0, 0))
    name = lab.names[0]
    question = lab.book.question_for(name, ORDER)
    assert lab.devices[name].open(question) == lab.book.opened[name]
    lab.book.delivered -= {lab.names[5]}
    with pytest.raises(MessageError, match="second question"):
        lab.devices[name].open(lab.book.question_for(name, ORDER))


def test_device_does_not_tell_when_too_few_delivered() -> None:
    lab = MaskedLab(6, layout=Layout(5, 4))
    lab.announce()
    lab.share(lab.names)
    lab.deliver(lab.names)
    lab.book.delivered = frozenset(lab.names[:4])
    with pytest.raises(MessageError, match="too few"):
        lab.devices[lab.names[0]].open(lab.book.question_for(lab.names[0], ORDER))


def test_device_does_not_mask_with_too_few() -> None:
    lab = MaskedLab(6, layout=Layout(5, 4))
    lab.announce()
    lab.share(lab.names)
    lab.book.sharers = frozenset(lab.names[:4])
    with pytest.raises(MessageError, match="too few"):
        lab.devices[lab.names[0]].receive(lab.book.inbox_for(lab.names[0], ORDER))


def test_same_messages_again_are_answered_alike_and_counted_once() -> None:
    lab = played(MaskedLab(5, layout=Layout(4, 3)))
    for name in lab.names:
        device = lab.devices[name]
        lab.book.add_keys(name, device.keys())
        lab.book.add_shares(name, device.share(lab.book.roster_for(name, ORDER)))
        device.receive(lab.book.inbox_for(name, ORDER))
        lab.book.add_opened(name, device.open(lab.book.question_for(name, ORDER)))
    assert np.array_equal(lab.unmask(), lab.expected())


def test_device_that_says_two_things_is_refused() -> None:
    lab = played(MaskedLab(4, layout=Layout(3, 2)))
    name = lab.names[0]
    with pytest.raises(UpdateError, match="two different"):
        lab.book.add_keys(name, lab.device(name, random.Random("other")).keys())
    told = lab.book.opened[name]
    with pytest.raises(UpdateError, match="two different"):
        lab.book.add_opened(name, msgspec.structs.replace(told, pieces=told.pieces[::-1]))


@pytest.mark.parametrize(
    "changes",
    [{"threshold": 2}, {"threshold": 6}, {"value_bits": 31}, {"ring": "ring16", "value_bits": 16}],
    ids=["half", "above the degree", "overflow", "narrow overflow"],
)
def test_device_refuses_terms_that_protect_nobody(changes: dict[str, Any]) -> None:
    lab = MaskedLab(6, layout=Layout(5, 3))
    lab.order = msgspec.structs.replace(lab.order, masking=msgspec.structs.replace(lab.terms, **changes))
    with pytest.raises(MessageError):
        lab.device(lab.names[0], random.Random(1))


def test_device_refuses_a_round_smaller_than_it_wants() -> None:
    from edge_agent.rounds.masking import DeviceMasking

    lab = MaskedLab(6, layout=Layout(5, 3))
    key = lab.keys[lab.names[0]]
    with pytest.raises(MessageError, match="smaller"):
        DeviceMasking(lab.order, tenant="t", fleet="f", device="d000", key=key, random=bytes, min_members=7)


def test_messages_out_of_turn_are_refused() -> None:
    lab = MaskedLab(4, layout=Layout(3, 2))
    name = lab.names[0]
    device = lab.devices[name]
    with pytest.raises(MessageError):
        device.mask(lab.vectors[name])
    lab.announce()
    lab.book.sharers = frozenset()
    with pytest.raises(MessageError):
        device.receive(lab.book.inbox_for(name, ORDER))
    with pytest.raises(MessageError):
        device.open(lab.book.question_for(name, ORDER))
    roster = lab.book.roster_for(name, ORDER)
    with pytest.raises(MessageError, match="too few neighbours"):
        device.share(msgspec.structs.replace(roster, peers=roster.peers[:1]))
    with pytest.raises(MessageError, match="no neighbours"):
        device.share(msgspec.structs.replace(roster, peers=(*roster.peers, roster.peers[0])))
    stranger = MaskPeer("x", b"1" * 32, b"2" * 32, b"3" * 32, b"4" * 64)
    with pytest.raises(MessageError, match="no neighbours"):
        device.share(msgspec.structs.replace(roster, peers=(*roster.peers, stranger)))


# --- the book on disk ---


def test_book_comes_back_from_its_bytes() -> None:
    lab = MaskedLab(5, layout=Layout(4, 3))
    lab.announce()
    lab.share(lab.names[:4])
    read = MaskBook(lab.book.group)
    read.read(lab.book.to_bytes())
    assert (read.keys, read.shares, read.sharers) == (lab.book.keys, lab.book.shares, lab.book.sharers)


@pytest.mark.parametrize("data", [b"", b"\xa0", b"\x80", b"\xff"], ids=["empty", "map", "list", "broken"])
def test_damaged_book_is_an_error_of_the_disk(data: bytes) -> None:
    with pytest.raises(StorageError):
        MaskBook(MaskedLab(3).book.group).read(data)


# --- the layout ---


@pytest.mark.parametrize(
    ("members", "dropout", "colluding"),
    [(4, 0.3, 0.0), (10, 0.3, 0.1), (30, 0.3, 0.1), (100, 0.3, 0.1), (300, 0.2, 0.1)],
)
def test_layout_completes_all_but_one_round_in_a_thousand(
    members: int, dropout: float, colluding: float
) -> None:
    """Counted anew by drawing: no neighbourhood of a surviving device ends below the threshold."""
    layout = choose_layout(members, dropout, colluding)
    assert layout.degree < 2 * layout.threshold <= 2 * layout.degree
    rng, failed, trials = np.random.default_rng(members), 0, 2000
    lost = int(dropout * members)
    for _ in range(trials):
        gone = np.zeros(members, bool)
        gone[rng.choice(members, lost, replace=False)] = True
        failed += _fails(gone, layout)
    assert failed / trials <= 0.003


def _fails(gone: np.ndarray[Any, np.dtype[np.bool_]], layout: Layout) -> bool:
    """Places are those on the ring, so who is gone is at random there."""
    alive, half = (~gone).astype(int), layout.degree // 2
    if layout.degree >= len(gone) - 1:
        return bool((alive.sum() - alive[alive == 1]).min() < layout.threshold)
    near = sum(np.roll(alive, offset) for offset in range(-half, half + 1) if offset)
    return bool((near[alive == 1] < layout.threshold).any())


def test_layout_grows_slower_than_the_fleet() -> None:
    degrees = [choose_layout(count, 0.1, 0.05).degree for count in (50, 200, 1000)]
    assert degrees[2] < 100
    assert 4 * degrees[2] / 1000 < degrees[0] / 50


@pytest.mark.parametrize("members", [2, 1025])
def test_layout_of_too_few_or_too_many_is_refused(members: int) -> None:
    with pytest.raises(QuorumError):
        choose_layout(members, 0.1, 0.0)


def test_layout_that_cannot_survive_is_refused() -> None:
    with pytest.raises(QuorumError, match="drop out"):
        choose_layout(4, 0.6, 0.0)


def test_exact_tail_agrees_with_a_worked_example() -> None:
    """10 devices, 3 lost: of 8 neighbours 5 are left whoever they are, and no gap of 4 can be."""
    assert choose_layout(10, 0.3, 0.0) == Layout(8, 5)
