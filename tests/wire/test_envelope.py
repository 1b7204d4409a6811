"""Sealing, signing and opening: round trips, every way to damage or misdirect a message, hostile but signed ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.wire.parties import (
    CLOUD_KEY,
    DEVICE_KEY,
    DOWNWARD,
    KEM,
    KEMS,
    LIMIT_BYTES,
    NOW,
    OTHER_KEY,
    RECIPIENTS,
    SIGNERS,
    STRANGER_KEY,
    UPWARD,
    down_header,
    open_down,
    open_up,
    up_header,
)
from wire.cbor import decode_canonical, encode_canonical, encode_tagged
from wire.cose import read_sign1, sign1
from wire.envelope import open_head, peek, seal, sign
from wire.errors import EnvelopeError, MessageError
from wire.header import Header, header_bytes, header_from_map, header_to_map
from wire.primitives import CONTENT_ALGORITHMS, KEM_ALGORITHMS, KemPrivateKey, SigningKey
from wire.records import RECORD_BYTES, size_class

BODY = b"an update of forty-two bytes, more or less"
SEALED = seal(up_header(), BODY, signer=DEVICE_KEY, recipient=KEM.public_key)
SIGNED = sign(down_header(), BODY, signer=CLOUD_KEY)


def reason_of(attempt: Callable[[], object]) -> str:
    """Why a message did not open."""
    with pytest.raises(EnvelopeError) as caught:
        attempt()
    assert str(caught.value) == "message does not open"
    return caught.value.reason


def content_of(message: bytes) -> list[Any]:
    """What the head of a message signs."""
    end = 4 + int.from_bytes(message[:4], "big")
    payload = read_sign1(message[4:end], limit_bytes=LIMIT_BYTES).payload
    content: list[Any] = decode_canonical(payload, limit_bytes=LIMIT_BYTES)
    return content


def ciphertext_of(message: bytes) -> bytes:
    return message[4 + int.from_bytes(message[:4], "big") :]


def signed_again(content: list[Any], ciphertext: bytes = b"", signer: SigningKey = DEVICE_KEY) -> bytes:
    """A message with a good signature over whatever `content` is."""
    head = sign1(encode_canonical(content), signer)
    return len(head).to_bytes(4, "big") + head + ciphertext


# --- round trips ---


@pytest.mark.parametrize("kem", KEM_ALGORITHMS)
@pytest.mark.parametrize("content_algorithm", CONTENT_ALGORITHMS)
@pytest.mark.parametrize("size", [0, 1, 255, 256, 1024, RECORD_BYTES, RECORD_BYTES + 1, 3 * RECORD_BYTES])
@pytest.mark.parametrize("pad", [False, True])
def test_sealed_message_opens_to_what_was_sealed(
    kem: str, content_algorithm: str, size: int, pad: bool
) -> None:
    body = os.urandom(size)
    message = seal(
        up_header(),
        body,
        signer=DEVICE_KEY,
        recipient=KEMS[kem].public_key,
        content_algorithm=content_algorithm,
        pad=pad,
    )
    opened = open_up(message)
    assert opened.body == body
    assert opened.header == up_header() == peek(message)
    assert opened.key_id == DEVICE_KEY.key_id
    assert body[:16] == b"" or len(body) < 16 or body not in message


@given(st.binary(max_size=3000), st.integers(1024, 1500))
def test_sealed_message_opens_whatever_its_record_size(body: bytes, record_bytes: int) -> None:
    message = seal(
        up_header(), body, signer=DEVICE_KEY, recipient=KEM.public_key, record_bytes=record_bytes, pad=True
    )
    assert open_up(message).body == body


def test_signed_message_opens_to_what_was_signed() -> None:
    opened = open_down(SIGNED)
    assert (opened.header, opened.body, opened.key_id) == (down_header(), BODY, CLOUD_KEY.key_id)


def test_overhead_of_a_sealed_message_stays_small() -> None:
    assert len(SEALED) - len(BODY) < 450
    hybrid = seal(up_header(), BODY, signer=DEVICE_KEY, recipient=KEMS["mlkem768-x25519"].public_key)
    assert len(hybrid) - len(BODY) < 1550


def test_two_sealings_of_one_body_have_nothing_in_common_but_their_headers() -> None:
    again = seal(up_header(), BODY, signer=DEVICE_KEY, recipient=KEM.public_key)
    assert ciphertext_of(again) != ciphertext_of(SEALED)
    assert content_of(again)[1] != content_of(SEALED)[1]


def test_padding_hides_the_length_within_a_size_class() -> None:
    sizes = {
        len(seal(up_header(), bytes(n), signer=DEVICE_KEY, recipient=KEM.public_key, pad=True))
        for n in range(0, 255, 15)
    }
    assert len(sizes) == 1


@given(st.integers(0, 2**40))
def test_size_class_costs_at_most_a_sixteenth(size: int) -> None:
    assert size <= size_class(size) <= max(256, size + size // 16)
    assert size_class(size_class(size)) == size_class(size)


def test_records_open_one_by_one_in_any_order() -> None:
    body = os.urandom(5000)
    message = seal(up_header(), body, signer=DEVICE_KEY, recipient=KEM.public_key, record_bytes=1024)
    end = 4 + int.from_bytes(message[:4], "big")
    opening = open_head(
        message[4:end],
        signers=SIGNERS,
        recipients=RECIPIENTS,
        expect=UPWARD,
        now=NOW,
        limit_bytes=LIMIT_BYTES,
    )
    plaintext, ciphertext = bytearray(len(body)), memoryview(message)[end:]
    for index in reversed(range(opening.records.count)):
        record = ciphertext[opening.records.ciphertext_slice(index)]
        opening.open_record_into(index, record, memoryview(plaintext)[opening.records.plaintext_slice(index)])
    assert plaintext == body


def test_record_in_the_place_of_another_is_refused() -> None:
    body = bytes(2048)
    message = seal(up_header(), body, signer=DEVICE_KEY, recipient=KEM.public_key, record_bytes=1024)
    content, ciphertext = content_of(message), ciphertext_of(message)
    swapped = ciphertext[1040:] + ciphertext[:1040]
    assert reason_of(lambda: open_up(signed_again(content, swapped))) == "digest"
    content[3] = content[3][32:] + content[3][:32]
    assert reason_of(lambda: open_up(signed_again(content, swapped))) == "content"


def test_message_cut_to_its_first_record_is_refused() -> None:
    message = seal(up_header(), bytes(2048), signer=DEVICE_KEY, recipient=KEM.public_key, record_bytes=1024)
    content = content_of(message)
    content[2], content[3] = [1024, 1024, False], content[3][:32]
    assert reason_of(lambda: open_up(signed_again(content, ciphertext_of(message)[:1040]))) == "content"


# --- damage ---


@pytest.mark.parametrize("message", [SEALED, SIGNED], ids=["sealed", "signed"])
def test_no_flipped_bit_is_accepted(message: bytes) -> None:
    attempt = open_up if message is SEALED else open_down
    for at in range(len(message)):
        damaged = bytearray(message)
        damaged[at] ^= 1 << at % 8
        assert reason_of(lambda damaged=damaged: attempt(bytes(damaged)))


@pytest.mark.parametrize("message", [SEALED, SIGNED], ids=["sealed", "signed"])
def test_no_cut_or_longer_message_is_accepted(message: bytes) -> None:
    attempt = open_up if message is SEALED else open_down
    for end in range(len(message)):
        assert reason_of(lambda end=end: attempt(message[:end]))
    assert reason_of(lambda: attempt(message + b"\0"))


@given(st.binary(max_size=300))
@example(b"\xff\xff\xff\xff")
@example(b"\0\0\0\1\xd2")
def test_any_bytes_give_our_error(data: bytes) -> None:
    assert reason_of(lambda: open_up(data))
    assert reason_of(lambda: open_down(data))
    assert reason_of(lambda: peek(data))


@given(st.binary(max_size=120), st.binary(max_size=40))
def test_any_signed_bytes_give_our_error(payload: bytes, ciphertext: bytes) -> None:
    protected = encode_canonical({1: -8, 3: "application/shoal+cose", 4: DEVICE_KEY.key_id})
    signature = DEVICE_KEY.sign(encode_canonical(["Signature1", protected, b"", payload]))
    head = encode_tagged(18, [protected, {}, payload, signature])
    message = len(head).to_bytes(4, "big") + head + ciphertext
    assert reason_of(lambda: open_up(message))


def test_message_above_the_limit_is_refused_before_it_is_read() -> None:
    assert reason_of(lambda: open_up(SEALED, limit_bytes=len(SEALED) - 1)) == "size"


# --- hostile but signed: by an enrolled device that breaks the format ---


def with_content(at: int, value: object) -> bytes:
    content = content_of(SEALED)
    content[at] = value
    return signed_again(content, ciphertext_of(SEALED))


def with_encrypt(**changes: Any) -> bytes:
    protected, clear, nothing, recipients = content_of(SEALED)[1]
    to, sent, wrapped = recipients[0]
    parts = {
        "protected": protected,
        "clear": clear,
        "nothing": nothing,
        "to": to,
        "sent": sent,
        "wrapped": wrapped,
    }
    parts |= changes
    recipient = [parts["to"], parts["sent"], parts["wrapped"]]
    recipients = parts.get("recipients", [recipient])
    return with_content(1, [parts["protected"], parts["clear"], parts["nothing"], recipients])


def with_header(**changes: Any) -> bytes:
    plain: dict[Any, Any] = header_to_map(up_header()) | {int(k[1:]): v for k, v in changes.items()}
    return with_content(0, plain)


KID = KEM.key_id
HOSTILE: dict[str, tuple[bytes, str]] = {
    "content_not_a_list": (signed_again({}), "structure"),  # type: ignore[arg-type]
    "content_empty": (signed_again([]), "structure"),
    "content_of_a_signed_message": (signed_again([header_to_map(up_header()), b"", {}]), "structure"),
    "content_with_one_more": (signed_again([*content_of(SEALED), 0], ciphertext_of(SEALED)), "structure"),
    "header_not_a_map": (with_content(0, []), "header"),
    "header_unknown_key": (with_header(_16=0), "header"),
    "header_text_key": (with_content(0, header_to_map(up_header()) | {"v": 1}), "header"),
    "header_default_spelled_out": (with_header(_14=0), "header"),
    "header_version_2": (with_header(_1=2), "header"),
    "header_version_true": (with_header(_1=True), "header"),
    "header_seq_negative": (with_header(_8=-1), "header"),
    "header_seq_beyond_63_bits": (with_header(_8=2**63), "header"),
    "header_seq_float": (with_header(_8=1.0), "header"),
    "header_device_with_newline": (with_header(_6="watch-1\n"), "header"),
    "header_device_with_wildcard": (with_header(_6="+"), "header"),
    "header_device_all": (with_header(_6="*"), "header"),
    "header_base_too_long": (with_header(_11=bytes(33)), "header"),
    "header_base_as_text": (with_header(_11="AAAA"), "header"),
    "header_part_beyond_parts": (with_header(_14=1), "header"),
    "header_huge_text": (with_header(_9="r" * 65), "header"),
    "encrypt_not_a_list": (with_content(1, {}), "structure"),
    "encrypt_ciphertext_inside": (with_encrypt(nothing=b"inside"), "structure"),
    "encrypt_no_recipient": (with_encrypt(recipients=[]), "structure"),
    "encrypt_two_recipients": (with_encrypt(recipients=content_of(SEALED)[1][3] * 2), "structure"),
    "encrypt_iv_short": (with_encrypt(clear={5: bytes(11)}), "structure"),
    "encrypt_iv_and_more": (with_encrypt(clear={5: bytes(12), 6: 0}), "structure"),
    "encrypt_no_iv": (with_encrypt(clear={}), "structure"),
    "encrypt_another_iv": (with_encrypt(clear={5: bytes(12)}), "content"),
    "encrypt_unknown_algorithm": (with_encrypt(protected=encode_canonical({1: 1})), "algorithm"),
    "encrypt_algorithm_true": (with_encrypt(protected=encode_canonical({1: True})), "algorithm"),
    "encrypt_algorithm_list": (with_encrypt(protected=encode_canonical({1: [3]})), "algorithm"),
    "encrypt_other_algorithm": (with_encrypt(protected=encode_canonical({1: 24})), "key"),
    "encrypt_protected_and_more": (with_encrypt(protected=encode_canonical({1: 3, 2: 0})), "structure"),
    "encrypt_protected_not_canonical": (with_encrypt(protected=bytes.fromhex("a1011803")), "cbor"),
    "encrypt_protected_huge": (with_encrypt(protected=encode_canonical({1: bytes(99)})), "cbor"),
    "recipient_unknown_key_id": (with_encrypt(to=encode_canonical({1: 49, 4: bytes(8)})), "recipient"),
    "recipient_key_id_list": (with_encrypt(to=encode_canonical({1: 49, 4: [1]})), "structure"),
    "recipient_hybrid_for_classic": (with_encrypt(to=encode_canonical({1: -70001, 4: KID})), "algorithm"),
    "recipient_unknown_algorithm": (with_encrypt(to=encode_canonical({1: 50, 4: KID})), "algorithm"),
    "recipient_encapsulated_short": (with_encrypt(sent={-4: bytes(31)}), "key"),
    "recipient_encapsulated_zero": (with_encrypt(sent={-4: bytes(32)}), "key"),
    "recipient_encapsulated_text": (with_encrypt(sent={-4: "x" * 32}), "structure"),
    "recipient_encapsulated_missing": (with_encrypt(sent={}), "structure"),
    "recipient_wrapped_short": (with_encrypt(wrapped=bytes(47)), "structure"),
    "recipient_wrapped_other": (with_encrypt(wrapped=bytes(48)), "key"),
    "sizes_not_three": (with_content(2, [len(BODY), RECORD_BYTES]), "structure"),
    "sizes_true": (with_content(2, [True, RECORD_BYTES, False]), "structure"),
    "sizes_padded_number": (with_content(2, [len(BODY), RECORD_BYTES, 0]), "structure"),
    "sizes_negative": (with_content(2, [-1, RECORD_BYTES, False]), "size"),
    "sizes_beyond_the_limit": (with_content(2, [LIMIT_BYTES + 1, RECORD_BYTES, False]), "size"),
    "sizes_of_2_to_the_64": (with_content(2, [2**64 - 1, RECORD_BYTES, False]), "size"),
    "sizes_one_more": (with_content(2, [len(BODY) + 1, RECORD_BYTES, False]), "size"),
    "sizes_record_of_none": (with_content(2, [len(BODY), 0, False]), "size"),
    "sizes_record_too_long": (with_content(2, [len(BODY), 2**20, False]), "size"),
    "sizes_padded_that_is_not": (with_content(2, [len(BODY), RECORD_BYTES, True]), "padding"),
    "hashes_missing": (with_content(3, b""), "structure"),
    "hashes_one_more": (with_content(3, bytes(64)), "structure"),
    "hashes_other": (with_content(3, bytes(32)), "digest"),
    "extensions_not_a_map": (with_content(4, []), "structure"),
    "extension_critical": (with_content(4, {1: b""}), "extension"),
    "extension_zero": (with_content(4, {0: b""}), "extension"),
    "extension_with_text_key": (with_content(4, {"a": b""}), "extension"),
    "extension_not_bytes": (with_content(4, {-1: 1}), "extension"),
    "extension_too_long": (with_content(4, {-1: bytes(1025)}), "extension"),
    "extensions_too_many": (with_content(4, {-n: b"" for n in range(1, 10)}), "extension"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_signed_message_that_breaks_the_format_is_refused(name: str) -> None:
    message, reason = HOSTILE[name]
    assert reason_of(lambda: open_up(message)) == reason


def test_untouched_content_signed_again_opens() -> None:
    """The hostile cases fail for what they change, not for how they are made."""
    assert open_up(signed_again(content_of(SEALED), ciphertext_of(SEALED))).body == BODY


@given(st.integers(0, 4), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=40) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.integers(-9, 9), inner, max_size=4),
    max_leaves=8,
))  # fmt: skip
def test_any_signed_structure_gives_our_error(at: int, value: object) -> None:
    if at == 4 and type(value) is dict and value.keys() <= {-n for n in range(1, 10)}:
        return
    assert reason_of(lambda: open_up(with_content(at, value)))


# --- the outer structure ---


def with_sign1(
    protected: object = None, unprotected: object = None, payload: object = None, tag: int = 18
) -> bytes:
    outer = read_sign1(SIGNED[4:], limit_bytes=LIMIT_BYTES)
    parts = [outer.protected, {}, outer.payload, outer.signature]
    for at, value in ((0, protected), (1, unprotected), (2, payload)):
        if value is not None:
            parts[at] = value
    head = encode_tagged(tag, parts)
    return len(head).to_bytes(4, "big") + head


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        pytest.param(with_sign1(tag=98), "cbor", id="other_tag"),
        pytest.param(with_sign1(unprotected={4: b"kid"}), "structure", id="unprotected_header"),
        pytest.param(with_sign1(unprotected=[]), "structure", id="unprotected_list"),
        pytest.param(with_sign1(payload="text"), "structure", id="payload_text"),
        pytest.param(with_sign1(payload=b"other"), "signature", id="payload_other"),
        pytest.param(with_sign1(protected=b""), "cbor", id="protected_empty"),
        pytest.param(with_sign1(protected=encode_canonical({1: -8})), "structure", id="protected_without_key_id"),
        pytest.param(
            with_sign1(protected=encode_canonical({1: -7, 3: "application/shoal+cose", 4: CLOUD_KEY.key_id})),
            "algorithm",
            id="other_signature_algorithm",
        ),
        pytest.param(
            with_sign1(protected=encode_canonical({1: -8, 3: "text/plain", 4: CLOUD_KEY.key_id})),
            "algorithm",
            id="other_content_type",
        ),
        pytest.param(
            with_sign1(protected=encode_canonical({1: -8, 3: "application/shoal+cose", 4: [1]})),
            "structure",
            id="key_id_list",
        ),
        pytest.param(
            with_sign1(protected=encode_canonical({1: -8, 3: "application/shoal+cose", 4: bytes(8)})),
            "signer",
            id="unknown_signer",
        ),
    ],
)  # fmt: skip
def test_outer_structure_that_breaks_the_format_is_refused(message: bytes, reason: str) -> None:
    assert reason_of(lambda: open_down(message)) == reason


# --- who, to whom, when ---


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tenant": "rival"}, "fleet"),
        ({"fleet": "ankles"}, "fleet"),
        ({"type": "tm"}, "type"),
        ({"direction": "down"}, "direction"),
        ({"device": "watch-2"}, "sender"),
        ({"expiry": int(NOW) - 61}, "expired"),
    ],
)
def test_update_for_another_context_is_refused(changes: dict[str, Any], reason: str) -> None:
    message = seal(up_header(**changes), BODY, signer=DEVICE_KEY, recipient=KEM.public_key)
    assert reason_of(lambda: open_up(message)) == reason


def test_update_of_another_device_than_the_topic_names_is_refused() -> None:
    message = seal(up_header(device="watch-2"), BODY, signer=OTHER_KEY, recipient=KEM.public_key)
    assert reason_of(lambda: open_up(message)) == "device"
    assert open_up(message, expect=replace(UPWARD, device=None)).header.device == "watch-2"


def test_update_of_a_stranger_or_revoked_device_is_refused() -> None:
    message = seal(up_header(), BODY, signer=STRANGER_KEY, recipient=KEM.public_key)
    assert reason_of(lambda: open_up(message)) == "signer"
    rest = {key_id: signer for key_id, signer in SIGNERS.items() if signer.device != "watch-1"}
    assert reason_of(lambda: open_up(SEALED, signers=rest)) == "signer"


def test_update_for_another_key_is_refused() -> None:
    message = seal(up_header(), BODY, signer=DEVICE_KEY, recipient=KemPrivateKey.generate().public_key)
    assert reason_of(lambda: open_up(message)) == "recipient"


def test_update_stays_open_until_its_expiry_and_the_allowed_skew() -> None:
    message = seal(up_header(expiry=int(NOW)), BODY, signer=DEVICE_KEY, recipient=KEM.public_key)
    assert open_up(message, now=NOW + 60).body == BODY
    assert reason_of(lambda: open_up(message, now=NOW + 61)) == "expired"
    forever = seal(up_header(expiry=0), BODY, signer=DEVICE_KEY, recipient=KEM.public_key)
    assert open_up(forever, now=1e12).body == BODY


def test_thief_cannot_sign_another_devices_update_as_its_own() -> None:
    content = content_of(SEALED)
    content[0] = header_to_map(up_header(device="watch-2"))
    stolen = signed_again(content, ciphertext_of(SEALED), OTHER_KEY)
    assert reason_of(lambda: open_up(stolen, expect=replace(UPWARD, device="watch-2"))) == "key"
    kept = signed_again(content_of(SEALED), ciphertext_of(SEALED), OTHER_KEY)
    assert reason_of(lambda: open_up(kept)) == "sender"


@pytest.mark.parametrize(
    "changes",
    [{"round_number": 8}, {"base": b""}, {"seq": 42}, {"run": "autumn"}, {"epoch": 4}, {"expiry": 0}],
)
def test_header_is_bound_to_what_was_sealed(changes: dict[str, Any]) -> None:
    content = content_of(SEALED)
    content[0] = header_to_map(up_header(**changes))
    assert reason_of(lambda: open_up(signed_again(content, ciphertext_of(SEALED)))) == "key"


def test_forged_receipt_cannot_empty_an_outbox() -> None:
    """Not by an enrolled device, not from another fleet, not one meant for another device or for all."""
    everybody = {"signers": SIGNERS}
    by_device = sign(down_header(), BODY, signer=DEVICE_KEY)
    assert reason_of(lambda: open_down(by_device, **everybody)) == "sender"
    assert reason_of(lambda: open_down(by_device)) == "signer"
    for changes, reason in (
        ({"device": "watch-2"}, "device"),
        ({"device": "*"}, "device"),
        ({"fleet": "ankles"}, "fleet"),
        ({"tenant": "rival"}, "fleet"),
        ({"type": "tm"}, "type"),
    ):
        message = sign(down_header(**changes), BODY, signer=CLOUD_KEY)
        assert reason_of(lambda message=message: open_down(message)) == reason


def test_broadcast_is_for_all_devices_and_nothing_else_is() -> None:
    for kind in ("rd", "md"):
        message = sign(down_header(type=kind, device="*"), BODY, signer=CLOUD_KEY)
        assert open_down(message).body == BODY
        to_one = sign(down_header(type=kind), BODY, signer=CLOUD_KEY)
        assert reason_of(lambda to_one=to_one: open_down(to_one)) == "device"
    to_nobody = replace(DOWNWARD, device=None)
    assert reason_of(lambda: open_down(SIGNED, expect=to_nobody)) == "device"


def test_signed_message_is_not_taken_for_a_sealed_one_or_the_reverse() -> None:
    signed = sign(up_header(), BODY, signer=DEVICE_KEY)
    assert reason_of(lambda: open_up(signed)) == "structure"
    assert reason_of(lambda: open_down(SEALED, signers=SIGNERS, expect=UPWARD)) == "size"
    with_body = signed[:4] + signed[4:] + b"more"
    assert reason_of(lambda: open_down(with_body, signers=SIGNERS, expect=UPWARD)) == "size"


# --- extensions ---


def test_ignorable_extension_arrives_and_critical_one_is_refused() -> None:
    message = sign(down_header(), BODY, signer=CLOUD_KEY, extensions={-5: b"hint"})
    assert open_down(message).extensions == {-5: b"hint"}
    critical = sign(down_header(), BODY, signer=CLOUD_KEY, extensions={5: b"must"})
    assert reason_of(lambda: open_down(critical)) == "extension"


@pytest.mark.parametrize("extensions", [{0: b""}, {-1: bytes(1025)}, {-n: b"" for n in range(1, 10)}])
def test_extensions_that_no_receiver_accepts_are_not_sent(extensions: dict[int, bytes]) -> None:
    with pytest.raises(MessageError):
        sign(down_header(), BODY, signer=CLOUD_KEY, extensions=extensions)


# --- header ---


HEADERS = st.builds(
    up_header,
    type=st.from_regex(r"[a-z]{2,16}", fullmatch=True),
    device=st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
    epoch=st.integers(0, 2**63 - 1),
    seq=st.integers(0, 2**63 - 1),
    run=st.from_regex(r"[A-Za-z0-9_-]{0,64}", fullmatch=True),
    round_number=st.integers(0, 2**63 - 1),
    base=st.binary(max_size=32),
    schema=st.binary(max_size=32),
    expiry=st.integers(0, 2**63 - 1),
    parts=st.integers(1, 2**31 - 1),
)


@given(HEADERS)
def test_header_round_trips_and_has_one_byte_string(header: Header) -> None:
    data = header_bytes(header)
    again = header_from_map(decode_canonical(data, limit_bytes=1024))
    assert again == header
    assert header_bytes(again) == data


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "*"},
        {"device": ""},
        {"device": "a/b"},
        {"tenant": "x" * 65},
        {"type": "Up"},
        {"type": "u"},
        {"seq": -1},
        {"seq": 2**63},
        {"base": bytes(33)},
        {"part": 1},
        {"parts": 0},
        {"direction": "sideways"},
        {"version": 2},
    ],
)
def test_header_that_no_receiver_accepts_is_not_sealed(changes: dict[str, Any]) -> None:
    header = msgspec.structs.replace(up_header(), **changes)
    with pytest.raises(MessageError):
        seal(header, BODY, signer=DEVICE_KEY, recipient=KEM.public_key)
    with pytest.raises(MessageError):
        sign(header, BODY, signer=DEVICE_KEY)
