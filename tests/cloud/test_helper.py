"""The helper: which sums it tells, and everything that it refuses."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cloud_server.helper.store import MEMORY, HelperStore, RoundName
from tests.cloud.helper_lab import NOW, HelperLab, Sealer
from wire.cbor import decode_canonical, encode_canonical
from wire.errors import ConfigurationError, StorageError
from wire.helper import HelperAnswer, HelperRefusal, MaskSeed, helped_context, helped_mask_key
from wire.messages import MAX_SEALED_SEED_BYTES
from wire.primitives import KemPrivateKey, SigningKey
from wire.ring import ring_vector


def refusal(said: HelperAnswer | HelperRefusal) -> tuple[str, tuple[int, ...]]:
    assert isinstance(said, HelperRefusal), "a sum was told"
    return said.reason, said.unusable


def told(lab: HelperLab, said: HelperAnswer | HelperRefusal) -> np.ndarray:
    assert isinstance(said, HelperAnswer), said
    return ring_vector(said.total, lab.ring, lab.size)


@pytest.mark.parametrize("size", [50, 200_000])
def test_masks_come_off_the_sum_bit_for_bit(size: int) -> None:
    lab = HelperLab(5, size=size)
    sent = [lab.mask(name) for name in lab.names]
    masks = told(lab, lab.ask([sealed for _, sealed in sent]))
    total = sum((masked for masked, _ in sent), np.zeros(size, lab.ring.dtype))
    assert np.array_equal(
        (total - masks).astype(lab.ring.dtype), sum(lab.vectors.values()).astype(lab.ring.dtype)
    )
    assert all(np.count_nonzero(masked == lab.vectors[name]) < size / 10
               for name, (masked, _) in zip(lab.names, sent, strict=True))  # fmt: skip


def test_sum_of_too_few_is_not_told() -> None:
    lab = HelperLab(5, min_devices=4)
    assert refusal(lab.ask(lab.seeds(lab.names[:3]))) == ("too_few", ())
    assert isinstance(lab.ask(lab.seeds(lab.names[:4])), HelperAnswer)


def test_invented_devices_count_for_nobody() -> None:
    """An aggregator with two real devices and any number of its own: nothing is told, with or without them."""
    lab = HelperLab(5, members=16, value_bits=12)
    strangers = [f"sybil-{number}" for number in range(8)]
    invented = [lab.mask(name, key=SigningKey(random.Random(name).randbytes(32)))[1] for name in strangers]
    real = lab.seeds(lab.names[:2])
    assert refusal(lab.ask([*real, *invented])) == ("unusable", tuple(range(2, 10)))
    assert refusal(lab.ask(real)) == ("too_few", ())


def test_device_that_left_the_roster_counts_no_more() -> None:
    lab = HelperLab(4)
    assert lab.store.remove(lab.names[3])
    assert refusal(lab.ask(lab.seeds(lab.names))) == ("unusable", (3,))


def test_forged_signature_is_found() -> None:
    """A seed in a device's name, signed by a key that is not its own, or by another device's."""
    lab = HelperLab(5)
    stranger = SigningKey(b"s" * 32)
    forged = lab.mask(lab.names[0], key=stranger)[1]
    borrowed = lab.mask(lab.names[1], key=lab.keys[lab.names[4]])[1]
    seeds = [forged, borrowed, *lab.seeds(lab.names[2:])]
    assert refusal(lab.ask(seeds)) == ("unusable", (0, 1))


def test_flipped_bit_is_found() -> None:
    lab = HelperLab(4)
    seeds = lab.seeds(lab.names)
    for at in range(0, len(seeds[0]), 37):
        damaged = bytearray(seeds[0])
        damaged[at] ^= 1
        assert refusal(lab.ask([bytes(damaged), *seeds[1:]])) == ("unusable", (0,))


@pytest.mark.parametrize(("run", "number"), [("run", 2), ("other", 1)])
def test_seed_of_another_round_is_worth_nothing(run: str, number: int) -> None:
    lab = HelperLab(4)
    old = lab.mask(lab.names[0], lab.order(number, run))[1]
    assert refusal(lab.ask([old, *lab.seeds(lab.names[1:])])) == ("unusable", (0,))


def test_seed_of_other_terms_is_worth_nothing() -> None:
    lab = HelperLab(4)
    other = lab.mask(lab.names[0], lab.order(bound=0.5))[1]
    assert refusal(lab.ask([other, *lab.seeds(lab.names[1:])])) == ("unusable", (0,))
    assert refusal(lab.ask(lab.seeds(lab.names), params_size=49)) == ("unusable", (0, 1, 2, 3))


def test_device_is_counted_once() -> None:
    lab = HelperLab(4)
    first, second = lab.mask(lab.names[0])[1], lab.mask(lab.names[0], min_devices=2)[1]
    assert refusal(lab.ask([first, second, lab.mask(lab.names[1])[1]])) == ("unusable", (1,))


def test_device_that_wants_more_company_is_left_out_and_decides_for_nobody_else() -> None:
    lab = HelperLab(5)
    shy = lab.mask(lab.names[0], min_devices=6)[1]
    others = lab.seeds(lab.names[1:])
    assert refusal(lab.ask([shy, *others])) == ("unusable", (0,))
    assert isinstance(lab.ask(others), HelperAnswer)


def test_seed_for_another_helper_does_not_open() -> None:
    lab = HelperLab(4)
    other = KemPrivateKey.generate()
    sealed = lab.mask(
        lab.names[0], lab.order(helper_key_id=other.key_id), helper=other.public_key
    )[1]  # fmt: skip
    assert refusal(lab.ask([sealed, *lab.seeds(lab.names[1:])])) == ("unusable", (0,))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"tenant": "x"}, "foreign"), ({"fleet": "x"}, "foreign")],
)
def test_question_of_another_fleet_is_refused(changes: dict[str, str], reason: str) -> None:
    lab = HelperLab(4)
    assert refusal(lab.ask(lab.seeds(lab.names), **changes)) == (reason, ())


def test_question_for_another_key_is_refused() -> None:
    lab = HelperLab(4)
    order = lab.order(helper_key_id=b"another!")
    assert refusal(lab.ask(lab.seeds(lab.names[:3]), terms=order.helped)) == ("key", ())


def test_terms_that_would_overflow_are_refused() -> None:
    lab = HelperLab(4)
    terms = msgspec.structs.replace(lab.terms, value_bits=31)
    assert refusal(lab.ask(lab.seeds(lab.names), terms=terms)) == ("terms", ())
    small = msgspec.structs.replace(lab.terms, members=3)
    assert refusal(lab.ask(lab.seeds(lab.names), terms=small)) == ("terms", ())


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xa0", bytes(100)])
def test_any_bytes_are_refused_by_a_word(data: bytes) -> None:
    assert refusal(HelperLab(3).helper.answer(data)) == ("malformed", ())


def test_seed_above_its_bound_is_malformed() -> None:
    lab = HelperLab(4)
    question = decode_canonical(lab.question(lab.seeds(lab.names)), limit_bytes=2**20)
    question["seeds"][0] = bytes(MAX_SEALED_SEED_BYTES + 1)
    assert refusal(lab.helper.answer(encode_canonical(question))) == ("malformed", ())


# --- once a round ---


def test_second_question_of_a_round_is_refused_and_the_first_is_answered_again(tmp_path: Path) -> None:
    lab = HelperLab(5, path=tmp_path / "helper.db")
    seeds = lab.seeds(lab.names)
    first = told(lab, lab.ask(seeds))
    assert refusal(lab.ask(seeds[:4])) == ("already_answered", ())
    assert refusal(lab.ask(seeds[::-1])) == ("already_answered", ())
    assert np.array_equal(told(lab, lab.ask(seeds)), first)
    assert isinstance(lab.ask(lab.seeds(lab.names[:4], lab.order(2)), round_number=2), HelperAnswer)


def test_refusal_does_not_use_up_the_round() -> None:
    lab = HelperLab(5)
    seeds = lab.seeds(lab.names)
    assert refusal(lab.ask([*seeds[:4], b""])) == ("unusable", (4,))
    assert isinstance(lab.ask(seeds), HelperAnswer)


def test_restart_between_commit_and_answer_tells_nothing_else(tmp_path: Path) -> None:
    """What was committed counts, whether or not anybody heard the answer."""
    lab = HelperLab(5, path=tmp_path / "helper.db")
    seeds = lab.seeds(lab.names)
    told(lab, lab.ask(seeds))  # nobody hears it: the process ends here
    lab.helper = lab.open()
    assert refusal(lab.ask(seeds[1:])) == ("already_answered", ())
    assert isinstance(lab.ask(seeds), HelperAnswer)


def test_sum_that_cannot_be_noted_is_not_told(tmp_path: Path) -> None:
    lab = HelperLab(4, path=tmp_path / "helper.db")
    seeds = lab.seeds(lab.names)
    lab.store.close()
    with pytest.raises(StorageError):
        lab.ask(seeds)
    lab.store = HelperStore(lab.path)
    assert lab.store.summary() == (0, 0.0)


def test_two_processes_cannot_answer_two_questions(tmp_path: Path) -> None:
    """The database decides, not the process's memory."""
    lab = HelperLab(5, path=tmp_path / "helper.db")
    other = HelperStore(tmp_path / "helper.db")
    named = RoundName("run", 0, 1)
    assert other.note_answered(named, b"q" * 32, devices=3, now=NOW)
    assert not lab.store.note_answered(named, b"p" * 32, devices=3, now=NOW)
    assert refusal(lab.ask(lab.seeds(lab.names))) == ("already_answered", ())
    other.close()


def test_cloud_that_came_back_from_a_backup_goes_on_in_another_life() -> None:
    """It counts rounds again that the lost life has asked about: devices sealed other seeds, to another life. What is
    left of the lost one is asked about no more."""
    lab = HelperLab(4)
    lost = lab.seeds(lab.names)
    assert isinstance(lab.ask(lost), HelperAnswer)
    order = lab.order(life=1)
    assert isinstance(lab.ask(lab.seeds(lab.names, order), terms=order.helped), HelperAnswer)
    assert refusal(lab.ask(lab.seeds(lab.names[:3], order), terms=order.helped)) == ("already_answered", ())
    assert refusal(lab.ask(lab.seeds(lab.names, lab.order(2)), round_number=2)) == ("past_life", ())
    assert isinstance(lab.ask(lost), HelperAnswer)
    assert refusal(lab.ask(lost, terms=lab.order(life=2).helped)) == ("unusable", (0, 1, 2, 3))


# --- the roster ---


def test_roster_keeps_one_key_for_a_device_and_one_device_for_a_key() -> None:
    store = HelperStore(MEMORY)
    assert store.add([("a", b"A" * 32), ("b", b"B" * 32)], NOW) == 2
    assert store.add([("a", b"A" * 32)], NOW) == 0
    for wrong in (("a", b"X" * 32), ("c", b"B" * 32)):
        with pytest.raises(ConfigurationError):
            store.add([("d", b"D" * 32), wrong], NOW)
    assert [row.device for row in store.roster()] == ["a", "b"]
    assert store.remove("a")
    assert not store.remove("a")


def test_file_that_is_no_database_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / "helper.db"
    path.write_bytes(b"not a database, whatever it says" * 100)
    with pytest.raises(StorageError):
        HelperStore(path)


def test_mask_follows_from_the_round_and_nothing_else() -> None:
    lab = HelperLab(3)
    contexts = {
        helped_context("t", "f", run, number, terms)
        for run in ("a", "b")
        for number in (1, 2)
        for terms in (lab.terms, lab.order(bound=0.5).helped)
        if terms is not None
    }
    assert len(contexts) == 8
    assert len({helped_mask_key(context, b"s" * 32) for context in contexts}) == 8


def test_body_that_is_no_seed_is_unusable() -> None:
    """Signed by a rostered device and sealed to the helper, but of another fleet's round."""
    lab = HelperLab(4)
    body = MaskSeed(context=bytes(32), seed=bytes(32), params_size=lab.size, min_devices=3)
    sealed = Sealer(lab.names[0], lab.keys[lab.names[0]])(body, lab.kem.public_key, run="run", round_number=1)
    assert refusal(lab.ask([sealed, *lab.seeds(lab.names[1:])])) == ("unusable", (0,))
