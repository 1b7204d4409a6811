"""What a helper is told and answers: bytes that come back, known values, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest

from wire.cbor import encode_canonical
from wire.errors import MessageError, ReleaseError
from wire.helper import (
    HelperAnswer,
    HelperQuestion,
    HelperRefusal,
    MaskSeed,
    encode_answer,
    helped_context,
    helped_mask_key,
    helper_json,
    read_answer,
    read_helper_json,
    read_question,
)
from wire.mask_terms import HelpedTerms
from wire.messages import BODIES, Body, Order, Update, decode_body, encode_body
from wire.primitives import KemPrivateKey, sha256
from wire.ring import add_mask

TENANT, FLEET = "acme", "gateways"
DIGEST = bytes(range(32))
TERMS = HelpedTerms(members=20, ring="ring32", value_bits=27, bound=1.5, helper_key_id=b"helper01", life=2)
QUESTION = HelperQuestion(
    tenant=TENANT,
    fleet=FLEET,
    run="main",
    round_number=7,
    terms=TERMS,
    params_size=10,
    seeds=(b"one", b"two"),
)
QUESTION_BYTES = encode_body(QUESTION)
TOTAL_BYTES = 40
ANSWERS = (
    HelperAnswer(question=sha256(QUESTION_BYTES), total=bytes(TOTAL_BYTES)),
    HelperRefusal(reason="unusable", unusable=(1,)),
)
EXAMPLES: tuple[Body, ...] = (
    MaskSeed(context=DIGEST, seed=DIGEST, params_size=10, min_devices=3),
    QUESTION,
    *ANSWERS,
)
KEY = KemPrivateKey.from_bytes("x25519", DIGEST).public_key
HELPER_FILE = helper_json(TENANT, FLEET, KEY)


@pytest.mark.parametrize("body", EXAMPLES, ids=lambda body: body.TYPE)
def test_body_comes_back_and_is_no_message_of_the_broker(body: Body) -> None:
    data = encode_body(body)
    assert encode_body(decode_body(data, type(body))) == data
    assert body.TYPE not in BODIES
    plain = msgspec.to_builtins(body, builtin_types=(bytes,))
    with pytest.raises(MessageError):
        decode_body(encode_canonical(plain | {"zz": 0}), type(body))


@pytest.mark.parametrize(
    "changes",
    [{"seeds": ()}, {"seeds": (bytes(4097),)}, {"params_size": 0}, {"round_number": -1}, {"run": "a/b"}],
    ids=lambda changes: next(iter(changes)),
)
def test_question_out_of_bounds_is_refused(changes: dict[str, Any]) -> None:
    plain = msgspec.to_builtins(QUESTION, builtin_types=(bytes,)) | changes
    with pytest.raises(MessageError):
        read_question(encode_canonical(plain))


def test_order_and_update_of_a_round_with_a_helper_come_back() -> None:
    order = Order(
        order_id=bytes(16), kind="train", run="main", round_number=7, head_sha256=DIGEST, deadline=1e9,
        slot_bytes=1000, helped=TERMS,
    )  # fmt: skip
    assert decode_body(encode_body(order), Order) == order
    assert order.ring_terms == TERMS
    update = Update(
        update_id=bytes(16), order_id=bytes(16), run="main", round_number=7, base_sha256=DIGEST, num_examples=1,
        codec="ring32", params_size=10, payload=bytes(40), sealed_seed=b"sealed",
    )  # fmt: skip
    assert decode_body(encode_body(update), Update) == update
    without = msgspec.structs.replace(update, sealed_seed=b"")
    assert b"sealed_seed" not in encode_body(without)


def test_context_and_mask_are_what_they_were() -> None:
    """Known values: a release of ours that computes others could not take part with one that computes these."""
    context = helped_context(TENANT, FLEET, "main", 7, TERMS)
    assert context.hex() == "cbe78c49d781a3a3cf305569df9be8234fb357de06c66e13d513411214c41f8d"
    key = helped_mask_key(context, DIGEST)
    assert key.hex() == "e3949feff49f5377ad5b7ffa48a9e74d67dc7feb34d543a69244c08ca9425d1f"
    values = np.zeros(3, "<u4")
    add_mask(values, key)
    assert values.tolist() == [3119578327, 1071877258, 3639849648]


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.TYPE)
def test_answer_comes_back(answer: HelperAnswer | HelperRefusal) -> None:
    assert read_answer(encode_answer(answer), question=QUESTION_BYTES, total_bytes=TOTAL_BYTES) == answer


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"ha",
        b"xx" + encode_body(ANSWERS[0]),
        encode_answer(HelperAnswer(question=DIGEST, total=bytes(TOTAL_BYTES))),
        encode_answer(HelperAnswer(question=sha256(QUESTION_BYTES), total=bytes(TOTAL_BYTES - 1))),
        encode_answer(HelperAnswer(question=sha256(QUESTION_BYTES), total=bytes(4000))),
    ],
    ids=["nothing", "no body", "unknown", "another question", "too short", "too long"],
)
def test_answer_that_is_none_to_this_question_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        read_answer(data, question=QUESTION_BYTES, total_bytes=TOTAL_BYTES)


def test_helpers_file_comes_back_for_its_fleet_only() -> None:
    assert read_helper_json(HELPER_FILE, tenant=TENANT, fleet=FLEET).key_id == KEY.key_id
    for tenant, fleet in (("other", FLEET), (TENANT, "other")):
        with pytest.raises(ReleaseError):
            read_helper_json(HELPER_FILE, tenant=tenant, fleet=fleet)


@pytest.mark.parametrize(
    "change",
    [
        lambda named: named.update(more=1),
        lambda named: named.pop("helper"),
        lambda named: named["helper"].update(id="00" * 8),
        lambda named: named["helper"].update(public="00"),
        lambda named: named["helper"].update(algorithm="rsa"),
    ],
)
def test_file_that_names_no_helper_is_refused(change: Any) -> None:
    named = json.loads(HELPER_FILE)
    change(named)
    with pytest.raises(ReleaseError):
        read_helper_json(json.dumps(named).encode(), tenant=TENANT, fleet=FLEET)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"{" * 100_000])
def test_bytes_that_are_no_helpers_file_are_refused(data: bytes) -> None:
    with pytest.raises(ReleaseError):
        read_helper_json(data, tenant=TENANT, fleet=FLEET)
