"""Bodies: round trip, closed key sets, bounds, and any bytes give a body or our error."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.cbor import encode_canonical
from wire.errors import MessageError
from wire.mask_terms import MaskTerms
from wire.messages import (
    BODIES,
    Announcement,
    Birth,
    BlobRef,
    Body,
    Evaluation,
    InferenceReport,
    Invitation,
    Join,
    MaskInbox,
    MaskKeys,
    MaskMember,
    MaskOpened,
    MaskPeer,
    MaskQuestion,
    MaskRoster,
    MaskShares,
    Need,
    Order,
    Receipt,
    Telemetry,
    TrainConfig,
    Update,
    decode_body,
    encode_body,
)

NONCE, DIGEST = bytes(range(16)), bytes(range(32))
HEAD = BlobRef(sha256=DIGEST, size_bytes=2000, chunk_bytes=1024, chunk_sha256=(DIGEST, DIGEST))
ROUND: dict[str, Any] = {"run": "spring", "round_number": 3}
REPLY: dict[str, Any] = {
    **ROUND,
    "update_id": NONCE,
    "order_id": NONCE,
    "base_sha256": DIGEST,
    "num_examples": 120,
    "metrics": {"loss": 0.5},
}
EXAMPLES: list[Body] = [
    Birth(
        status="online",
        boot_id=NONCE,
        agent_version="0.1.0",
        wire_versions=(1, 1),
        codecs=("int4", "dithered"),
    ),
    Telemetry(
        uptime_seconds=1.5,
        release_version=2,
        requests_total=9,
        errors_total=0,
        samples=4,
        labelled_samples=2,
        outbox=0,
    ),
    InferenceReport(
        release_version=2,
        requests=9,
        errors=0,
        latency_p50_seconds=1e-4,
        latency_p99_seconds=2e-3,
        confidence_mean=0.7,
        label_counts=(4, 5),
    ),
    Invitation(**ROUND, open=True, deadline=1e9, graphs_sha256=DIGEST, head=HEAD, train=TrainConfig()),
    Order(
        **ROUND,
        order_id=NONCE,
        kind="train",
        head_sha256=DIGEST,
        deadline=1e9,
        slot_bytes=100_000,
        overrides={"epochs": 2, "learning_rate": 0.1, "codec": "int4"},
    ),
    Join(order_id=NONCE, accepted=False, reason="battery"),
    Update(**REPLY, codec="dithered", params_size=10, payload=b"payload", buffers=b"\0\0"),
    Evaluation(**REPLY),
    Receipt(update_id=NONCE, transfer=DIGEST, verdict="missing", missing=(0, 4)),
    Announcement(channel="stable", release_version=4, timestamp=b"{}"),
    Need(sha256=DIGEST, bitmap=b"\x05"),
    MaskKeys(order_id=NONCE, mask_key=DIGEST, channel_key=DIGEST, commitment=DIGEST, signature=2 * DIGEST),
    MaskRoster(
        order_id=NONCE,
        members=(MaskMember("a", DIGEST), MaskMember("b", DIGEST)),
        peers=(MaskPeer("b", DIGEST, DIGEST, DIGEST, 2 * DIGEST),),
    ),
    MaskShares(order_id=NONCE, pieces=(b"", b"p" * 48)),
    MaskInbox(order_id=NONCE, pieces=(b"p" * 48, b"")),
    MaskQuestion(order_id=NONCE, delivered=b"\x03"),
    MaskOpened(order_id=NONCE, pieces=(b"s" * 16, b"")),
]
TERMS = MaskTerms(
    roster_sha256=DIGEST, members=9, degree=6, threshold=4, ring="ring16", value_bits=12, bound=1.0
)
UPDATE = next(body for body in EXAMPLES if isinstance(body, Update))


def test_order_of_a_masked_round_comes_back() -> None:
    order = next(body for body in EXAMPLES if isinstance(body, Order))
    masked = msgspec.structs.replace(order, masking=TERMS)
    assert decode_body(encode_body(masked), Order) == masked
    assert encode_body(msgspec.structs.replace(masked, masking=None)) == encode_body(order)


@pytest.mark.parametrize(
    "changes", [{"members": 2}, {"threshold": 0}, {"ring": "ring64"}, {"bound": 0.0}], ids=str
)
def test_terms_of_masking_out_of_bounds_are_refused(changes: dict[str, Any]) -> None:
    order = next(body for body in EXAMPLES if isinstance(body, Order))
    with pytest.raises(MessageError):
        encode_body(msgspec.structs.replace(order, masking=msgspec.structs.replace(TERMS, **changes)))


def test_every_type_has_an_example() -> None:
    assert {type(body) for body in EXAMPLES} == set(BODIES.values())
    assert all(BODIES[body.TYPE] is type(body) for body in EXAMPLES)


@pytest.mark.parametrize("body", EXAMPLES, ids=lambda body: body.TYPE)
def test_body_round_trips(body: Body) -> None:
    data = encode_body(body)
    again = decode_body(data, type(body))
    assert again == body
    assert encode_body(again) == data


@pytest.mark.parametrize("body", EXAMPLES, ids=lambda body: body.TYPE)
def test_body_with_another_key_or_without_a_needed_one_is_refused(body: Body) -> None:
    plain = msgspec.to_builtins(body, builtin_types=(bytes,))
    with pytest.raises(MessageError):
        decode_body(encode_canonical(plain | {"zz": 0}), type(body))
    needed = next(iter(body.__struct_fields__))
    del plain[needed]
    with pytest.raises(MessageError):
        decode_body(encode_canonical(plain), type(body))


@given(st.sampled_from(EXAMPLES), st.data())
def test_damaged_body_gives_another_body_or_our_error(body: Body, data: st.DataObject) -> None:
    encoded = bytearray(encode_body(body))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode_body(bytes(encoded), type(body))
    except MessageError:
        return
    assert decoded != body


@given(
    st.sampled_from(sorted(BODIES)),
    st.dictionaries(
        st.sampled_from([name for body in EXAMPLES for name in body.__struct_fields__]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.binary()
        | st.text()
        | st.lists(st.integers()),
    ),
)
def test_any_map_gives_a_body_or_our_error(kind: str, plain: dict[str, Any]) -> None:
    try:
        data = encode_canonical(plain)
        body = decode_body(data, BODIES[kind])
    except MessageError:
        return
    assert isinstance(body, BODIES[kind])


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"update_id": bytes(15)}, "update_id"),
        ({"base_sha256": "A" * 44}, "base_sha256"),
        ({"payload": "AAAA"}, "payload"),
        ({"num_examples": 0}, "num_examples"),
        ({"num_examples": 10**15}, "num_examples"),
        ({"num_examples": True}, "num_examples"),
        ({"num_examples": 3.0}, "num_examples"),
        ({"params_size": 2**26 + 1}, "params_size"),
        ({"codec": "gzip"}, "codec"),
        ({"run": "spring\n"}, "run"),
        ({"run": "a/b"}, "run"),
        ({"run": ""}, "run"),
        ({"metrics": {"loss": float("nan")}}, "finite"),
        ({"metrics": {"loss": float("inf")}}, "finite"),
        ({"metrics": {"n" * 65: 1.0}}, "metrics"),
        ({"metrics": {str(n): 1.0 for n in range(33)}}, "metrics"),
        ({"metrics": {"loss": "low"}}, "metrics"),
    ],
)
def test_update_out_of_bounds_is_refused_by_both_sides(changes: dict[str, Any], culprit: str) -> None:
    plain = msgspec.to_builtins(UPDATE, builtin_types=(bytes,)) | changes
    with pytest.raises(MessageError, match=culprit):
        decode_body(encode_canonical(plain), Update)
    with pytest.raises(MessageError):
        encode_body(msgspec.structs.replace(UPDATE, **changes))


@pytest.mark.parametrize(
    "config",
    [
        {"learning_rate": float("nan")},
        {"learning_rate": 0.0},
        {"momentum": 1.0},
        {"epochs": 0},
        {"epochs": 101},
        {"clipping_norm": float("inf")},
        {"seed": 2**63},
    ],
)
def test_training_out_of_bounds_is_refused(config: dict[str, Any]) -> None:
    invitation = next(body for body in EXAMPLES if isinstance(body, Invitation))
    bad = msgspec.structs.replace(invitation, train=msgspec.structs.replace(TrainConfig(), **config))
    with pytest.raises(MessageError):
        encode_body(bad)


def test_body_above_its_limit_is_refused() -> None:
    with pytest.raises(MessageError, match="longer than allowed"):
        decode_body(encode_body(UPDATE), Update, limit_bytes=100)


def test_field_that_has_its_default_does_not_travel() -> None:
    """So a receiver that does not know a newer field is not disturbed by it."""
    short = Join(order_id=NONCE, accepted=True)
    assert encode_body(short) == encode_canonical({"order_id": NONCE, "accepted": True})
    assert decode_body(encode_canonical({"order_id": NONCE, "accepted": True, "reason": ""}), Join) == short
