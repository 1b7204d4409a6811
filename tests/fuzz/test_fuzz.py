"""A run of the fuzzer over every decoder: nothing is accepted, nothing but our errors, and it finds what it is for."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from tests.fuzz.__main__ import GOAL_SHARE, found_after, run
from tests.fuzz.campaign import Result, attack, attack_envelopes
from tests.fuzz.corpus import FOLDER, stored
from tests.fuzz.decoders import DECODERS, Decoder
from tests.fuzz.envelopes import Generator
from tests.fuzz.mutation import respelled
from tests.fuzz.planted import BUGS, HARMLESS, Bug, hunt
from wire.cbor import decode_canonical, encode_canonical
from wire.errors import MessageError

SEED = 1
COUNT = 100_000


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The run of this seed, made once."""
    print(f"fuzzing by seed {SEED}")
    return run(SEED, COUNT)


@pytest.mark.slow
def test_hostile_envelopes_are_all_refused_by_our_own_error(report: dict[str, Any]) -> None:
    envelopes = report["envelopes"]
    assert envelopes["findings"] == []
    assert sum(envelopes["refused"].values()) == envelopes["count"] == COUNT
    assert 0.49 < envelopes["signed"] / COUNT < 0.51


@pytest.mark.slow
def test_every_reason_of_the_protocol_is_met(report: dict[str, Any]) -> None:
    """Clause 5.8 lists them; a reason that no hostile message meets would be one that nothing tests."""
    reasons = (
        "size cbor structure algorithm signature signer header direction fleet type sender device expired extension "
        "recipient key digest content padding"
    )
    assert set(report["envelopes"]["refused"]) == set(reasons.split())


@pytest.mark.slow
def test_every_decoder_gives_lawful_values_or_our_own_error(report: dict[str, Any]) -> None:
    decoders = report["decoders"]
    assert decoders["findings"] == []
    assert set(decoders["refused"]) == {decoder.name for decoder in DECODERS}


@pytest.mark.slow
def test_branches_of_the_decoders_are_reached(report: dict[str, Any]) -> None:
    branches = report["branches"]
    assert branches["total"] > 250
    assert branches["taken"] >= GOAL_SHARE * branches["total"], branches["missed"]


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_found_by_the_same_run(bug: Bug) -> None:
    found = hunt(bug, seed=SEED, count=COUNT)
    assert found_after(found) > 0


@pytest.mark.slow
def test_nothing_is_found_where_nothing_was_planted() -> None:
    assert found_after(hunt(HARMLESS, seed=SEED, count=2000)) == 0


@pytest.mark.parametrize("decoder", DECODERS, ids=lambda decoder: decoder.name)
def test_stored_input_gives_a_lawful_value_or_our_own_error(decoder: Decoder) -> None:
    result, random = Result(), Random(SEED)
    attack(decoder, [*decoder.seeds, *stored(decoder.name)], result)
    attack(decoder, (decoder.hostile(random) for _ in range(30)), result)
    assert result.findings == []
    assert result.count - result.refused[decoder.name] > 0


def test_few_hostile_envelopes_are_refused() -> None:
    result = attack_envelopes(SEED + 1, 500)
    assert (result.findings, result.count) == ([], 500)


def test_generator_makes_the_same_choices_by_the_same_seed() -> None:
    one, two = Generator(7), Generator(7)
    assert [one.next().kind for _ in range(200)] == [two.next().kind for _ in range(200)]


def test_other_spelling_means_the_same_and_is_refused() -> None:
    random, value = Random(3), {1: [b"bytes", "text", 5, {"k": -7}], 2: [True, None]}
    spellings = {respelled(random, value, 0.5) for _ in range(300)} - {encode_canonical(value)}
    assert len(spellings) > 100
    for data in spellings:
        with pytest.raises(MessageError):
            decode_canonical(data, limit_bytes=1000)


def test_every_stored_corpus_belongs_to_a_decoder() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} <= {decoder.name for decoder in DECODERS}
