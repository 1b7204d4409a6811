"""What must be refused, by name: more sealed and signed messages, single encodings, and numbers before the window.

Written by make_vectors.py. Unlike the fuzzer's inputs these stand for one rule each, so that another
implementation can be held against them one by one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from random import Random
from typing import Any

from tests.fuzz.envelopes import framed, sealed_oddly, signed_head
from tests.wire.parties import (
    CLOUD_KEY,
    DEVICE_KEY,
    KEM,
    KEMS,
    OTHER_KEY,
    STRANGER_KEY,
    down_header,
    up_header,
)
from wire.cbor import decode_canonical, encode_canonical, encode_tagged
from wire.chunks import split
from wire.cose import read_sign1
from wire.envelope import seal, sign
from wire.header import header_bytes, header_to_map
from wire.primitives import KemPrivateKey

_LIMIT_BYTES = 2**16
Refusal = tuple[str, str, bytes, str]
"""Name, kind (`sealed` for the cloud, `signed` for watch-1), message, reason."""


class Parts:
    """A good sealed message of three records, taken apart."""

    def __init__(self, kem: KemPrivateKey = KEM) -> None:
        self.message = seal(
            up_header(),
            bytes(range(250)) * 10,
            signer=DEVICE_KEY,
            recipient=kem.public_key,
            record_bytes=1024,
        )
        self.end = 4 + int.from_bytes(self.message[:4], "big")
        outer = read_sign1(self.message[4 : self.end], limit_bytes=_LIMIT_BYTES)
        self.outer = [outer.protected, {}, outer.payload, outer.signature]
        self.content: list[Any] = decode_canonical(outer.payload, limit_bytes=_LIMIT_BYTES)
        self.ciphertext = self.message[self.end :]

    def with_outer(self, at: int, value: object, tag: int = 18) -> bytes:
        parts = [*self.outer[:at], value, *self.outer[at + 1 :]]
        return framed(encode_tagged(tag, parts), self.ciphertext)

    def with_content(self, at: int, value: object, ciphertext: bytes | None = None) -> bytes:
        """Signed again by the device, so that only the content is at fault."""
        content = [*self.content[:at], value, *self.content[at + 1 :]]
        head = signed_head(encode_canonical(content), DEVICE_KEY)
        return framed(head, self.ciphertext if ciphertext is None else ciphertext)

    def with_payload(self, payload: bytes) -> bytes:
        return framed(signed_head(payload, DEVICE_KEY), self.ciphertext)


def refused_envelopes() -> list[Refusal]:
    return [*_outer_refusals(), *_content_refusals(), *_context_refusals(), *_sealing_refusals()]


def _outer_refusals() -> list[Refusal]:
    parts, payload = Parts(), Parts().outer[2]
    protected = {1: -8, 3: "application/shoal+cose", 4: DEVICE_KEY.key_id}

    def under(**changes: Any) -> bytes:
        odd = encode_canonical(protected | {int(key[1:]): value for key, value in changes.items()})
        return framed(signed_head(parts.outer[2], DEVICE_KEY, protected=odd), parts.ciphertext)

    stranger = encode_canonical(protected)
    return [
        ("unprotected_header", "sealed", parts.with_outer(1, {4: b"kid"}), "structure"),
        ("signature_of_63_bytes", "sealed", parts.with_outer(3, bytes(63)), "signature"),
        ("payload_is_text", "sealed", parts.with_outer(2, "text"), "structure"),
        ("protected_header_is_a_map", "sealed", parts.with_outer(0, protected), "structure"),
        ("another_signature_algorithm", "sealed", under(_1=-7), "algorithm"),
        ("another_content_type", "sealed", under(_3="application/cose"), "algorithm"),
        ("critical_header_of_cose", "sealed", under(_2=[1]), "structure"),
        ("forged_under_the_devices_key_id", "sealed",
         framed(signed_head(payload, STRANGER_KEY, protected=stranger), parts.ciphertext), "signature"),
        ("empty", "sealed", b"", "size"),
        ("head_of_no_bytes", "sealed", bytes(4), "cbor"),
    ]  # fmt: skip


def _content_refusals() -> list[Refusal]:
    parts = Parts()
    payload = parts.outer[2]
    protected, clear, nothing, [[to, sent, wrapped]] = parts.content[1]
    plain = header_to_map(up_header())

    def encrypt(**changes: Any) -> bytes:
        values = {
            "protected": protected,
            "clear": clear,
            "inside": nothing,
            "to": to,
            "sent": sent,
            "wrapped": wrapped,
        }
        values |= changes
        recipients = [[values["to"], values["sent"], values["wrapped"]]]
        return parts.with_content(1, [values["protected"], values["clear"], values["inside"], recipients])

    def to_key(algorithm: int, key_id: bytes) -> bytes:
        return encrypt(to=encode_canonical({1: algorithm, 4: key_id}))

    hashes = parts.content[3]
    swapped = parts.ciphertext[1040:2080] + parts.ciphertext[:1040] + parts.ciphertext[2080:]
    hashes_swapped = hashes[32:64] + hashes[:32] + hashes[64:]
    both = framed(
        signed_head(encode_canonical([*parts.content[:3], hashes_swapped, {}]), DEVICE_KEY), swapped
    )
    cut_content = [parts.content[0], parts.content[1], [1024, 1024, False], hashes[:32], {}]
    cut = framed(signed_head(encode_canonical(cut_content), DEVICE_KEY), parts.ciphertext[:1040])
    long_form = payload.replace(
        encode_canonical([2500, 1024, False]), b"\x83\x1a\0\0\x09\xc4\x19\x04\x00\xf4"
    )
    map_of_13 = b"\xad" + encode_canonical(plain)[1:] + encode_canonical(13) + encode_canonical(plain[13])
    twice = payload.replace(encode_canonical(plain), map_of_13)
    return [
        ("number_in_a_longer_form", "sealed", parts.with_payload(long_form), "cbor"),
        ("header_key_twice", "sealed", parts.with_payload(twice), "cbor"),
        ("content_of_indefinite_length", "sealed", parts.with_payload(b"\x9f" + payload[1:] + b"\xff"), "cbor"),
        ("bytes_behind_the_content", "sealed", parts.with_payload(payload + b"\0"), "cbor"),
        ("content_is_a_map", "sealed", parts.with_payload(encode_canonical({1: 2})), "structure"),
        ("version_2", "sealed", parts.with_content(0, plain | {1: 2}), "header"),
        ("version_missing", "sealed", parts.with_content(0, {key: plain[key] for key in plain if key != 1}), "header"),
        ("default_spelled_out", "sealed", parts.with_content(0, plain | {14: 0}), "header"),
        ("part_beyond_parts", "sealed", parts.with_content(0, plain | {14: 2, 15: 2}), "header"),
        ("device_with_a_wildcard", "sealed", parts.with_content(0, plain | {6: "+"}), "header"),
        ("device_with_a_newline", "sealed", parts.with_content(0, plain | {6: "watch-1\n"}), "header"),
        ("update_for_all_devices", "sealed", parts.with_content(0, plain | {6: "*"}), "header"),
        ("another_seq_than_was_sealed", "sealed", parts.with_content(0, plain | {8: 42}), "key"),
        ("unknown_content_algorithm", "sealed", encrypt(protected=encode_canonical({1: 1})), "algorithm"),
        ("content_algorithm_exchanged", "sealed", encrypt(protected=encode_canonical({1: 24})), "key"),
        ("unknown_kem", "sealed", to_key(50, KEM.key_id), "algorithm"),
        ("kem_of_the_other_kind", "sealed", to_key(-70001, KEM.key_id), "algorithm"),
        ("unknown_recipient", "sealed", to_key(49, bytes(8)), "recipient"),
        ("ciphertext_inside", "sealed", encrypt(inside=b"inside"), "structure"),
        ("iv_of_11_bytes", "sealed", encrypt(clear={5: bytes(11)}), "structure"),
        ("another_iv", "sealed", encrypt(clear={5: bytes(12)}), "content"),
        ("encapsulated_key_of_low_order", "sealed", encrypt(sent={-4: bytes(32)}), "key"),
        ("wrapped_key_of_47_bytes", "sealed", encrypt(wrapped=wrapped[1:]), "structure"),
        ("another_wrapped_key", "sealed", encrypt(wrapped=bytes(48)), "key"),
        ("records_in_another_order", "sealed", framed(parts.message[4 : parts.end], swapped), "digest"),
        ("records_and_hashes_in_another_order", "sealed", both, "content"),
        ("cut_to_its_first_record", "sealed", cut, "content"),
        ("one_hash_too_few", "sealed", parts.with_content(3, hashes[32:]), "structure"),
        ("plaintext_beyond_the_limit", "sealed", parts.with_content(2, [2**40, 1024, False]), "size"),
        ("record_of_no_bytes", "sealed", parts.with_content(2, [2500, 0, False]), "size"),
        ("padded_is_a_number", "sealed", parts.with_content(2, [2500, 1024, 0]), "structure"),
        ("nine_extensions", "sealed", parts.with_content(4, {-number: b"" for number in range(1, 10)}), "extension"),
        ("extension_zero", "sealed", parts.with_content(4, {0: b""}), "extension"),
        ("critical_extension_of_an_update", "sealed", parts.with_content(4, {1: b""}), "extension"),
    ]  # fmt: skip


def _context_refusals() -> list[Refusal]:
    parts = Parts()

    def receipt(**changes: Any) -> bytes:
        return sign(down_header(**changes), b"a receipt", signer=CLOUD_KEY)

    stolen = signed_head(
        encode_canonical([header_to_map(up_header(device="watch-2")), *parts.content[1:]]), OTHER_KEY
    )
    elsewhere = seal(up_header(), b"body", signer=DEVICE_KEY, recipient=KemPrivateKey.generate().public_key)
    downward = seal(up_header(direction="down"), b"body", signer=CLOUD_KEY, recipient=KEM.public_key)
    return [
        ("update_that_goes_down", "sealed", downward, "direction"),
        ("update_sealed_to_another_key", "sealed", elsewhere, "recipient"),
        ("update_taken_by_another_device", "sealed", framed(stolen, parts.ciphertext), "device"),
        ("update_signed_by_the_cloud", "sealed",
         seal(up_header(), b"body", signer=CLOUD_KEY, recipient=KEM.public_key), "sender"),
        ("clear_update", "sealed", sign(up_header(), b"body", signer=DEVICE_KEY), "structure"),
        ("receipt_of_another_fleet", "signed", receipt(fleet="ankles"), "fleet"),
        ("receipt_of_another_tenant", "signed", receipt(tenant="rival"), "fleet"),
        ("receipt_of_another_type", "signed", receipt(type="tm"), "type"),
        ("receipt_that_expired", "signed", receipt(expiry=1), "expired"),
        ("receipt_forged_by_a_stranger", "signed", sign(down_header(), b"", signer=STRANGER_KEY), "signer"),
        ("receipt_forged_by_another_device", "signed", sign(down_header(), b"", signer=OTHER_KEY), "sender"),
        ("broadcast_to_one_device", "signed", receipt(type="md"), "device"),
        ("receipt_with_bytes_behind_it", "signed", receipt() + b"\0", "size"),
        ("receipt_with_another_body", "signed", receipt().replace(b"a receipt", b"A receipt"), "signature"),
    ]  # fmt: skip


def _sealing_refusals() -> list[Refusal]:
    """By a device that does not keep to the rules inside what is sealed."""
    reasons = {
        "nonce": "content", "index": "content", "last": "content", "header": "content",
        "info": "key", "key_length": "structure", "content_algorithm": "content",
        "no_mark": "padding", "class": "padding", "zeros": "padding",
    }  # fmt: skip
    return [
        (f"sealed_with_another_{odd}" if odd not in ("no_mark", "zeros") else f"padding_of_{odd}", "sealed",
         sealed_oddly(Random(odd), odd, KEMS["x25519"]), reason)
        for odd, reason in reasons.items()
    ]  # fmt: skip


def refused_bytes() -> dict[str, dict[str, str]]:
    """Encodings in hex that a decoder refuses, by decoder (as tests/fuzz/decoders.py calls them) and name."""
    header = header_bytes(up_header())
    chunk = split(bytes(1000), 400)[1]
    int4 = struct.pack("<BBHI3e", 4, 0, 256, 600, 0.5, 0.25, 0.0) + b"\x7e" * 300
    found: dict[str, dict[str, bytes]] = {
        "cbor": {
            "nothing": b"",
            "two_items": b"\x01\x02",
            "one_in_two_bytes": b"\x18\x01",
            "length_in_two_bytes": b"\x58\x01a",
            "array_of_indefinite_length": b"\x9f\x01\xff",
            "string_of_indefinite_length": b"\x5f\x41a\xff",
            "map_of_indefinite_length": b"\xbf\x01\x02\xff",
            "keys_out_of_order": b"\xa2\x02\x00\x01\x00",
            "key_twice": b"\xa2\x01\x00\x01\x00",
            "key_of_bytes": b"\xa1\x41a\x00",
            "float_in_eight_bytes": b"\xfb\x3f\xf8" + bytes(6),
            "tag_of_a_big_number": b"\xc2\x49\x01" + bytes(8),
            "tag_of_a_regular_expression": b"\xd8\x23\x61a",
            "tag_of_a_shared_reference": b"\xd8\x1d\x00",
            "undefined": b"\xf7",
            "simple_value": b"\xf8\x20",
            "break_alone": b"\xff",
            "text_that_is_not_utf8": b"\x61\xff",
            "string_past_its_end": b"\x45abc",
            "array_of_2_to_the_60": b"\x9b\x10" + bytes(7),
            "seventeen_deep": b"\x81" * 17 + b"\x00",
        },
        "header": {
            "unknown_key": encode_canonical(header_to_map(up_header()) | {16: 0}),
            "default_spelled_out": encode_canonical(header_to_map(up_header()) | {15: 1}),
            "seq_below_zero": encode_canonical(header_to_map(up_header()) | {8: -1}),
            "seq_of_64_bits": encode_canonical(header_to_map(up_header()) | {8: 2**63}),
            "seq_is_a_float": encode_canonical(header_to_map(up_header()) | {8: 1.5}),
            "base_of_33_bytes": encode_canonical(header_to_map(up_header()) | {11: bytes(33)}),
            "list": encode_canonical([1]),
            "one_byte_more": header + b"\0",
        },
        "chunk": {
            "another_magic": b"XC" + chunk[2:],
            "version_2": chunk[:2] + b"\x02" + chunk[3:],
            "flags": chunk[:3] + b"\x01" + chunk[4:],
            "index_is_total": chunk[:4] + chunk[8:12] + chunk[8:],
            "total_of_none": chunk[:8] + bytes(4) + chunk[12:],
            "total_of_4097": chunk[:8] + (4097).to_bytes(4, "big") + chunk[12:],
            "size_below_total": chunk[:12] + bytes(7) + b"\x01" + chunk[20:],
            "size_that_does_not_fit": chunk[:12] + (10**6).to_bytes(8, "big") + chunk[20:],
            "header_alone": chunk[:52],
            "longer_than_120_kib": chunk.ljust(122_881, b"\0"),
        },
        "codec_int4": {
            "of_another_codec": b"\x03" + int4[1:],
            "flag_2": int4[:1] + b"\x02" + int4[2:],
            "block_of_128": int4[:2] + b"\x80\0" + int4[4:],
            "size_of_601": int4[:4] + (601).to_bytes(4, "little") + int4[8:],
            "infinite_scale": int4[:8] + b"\0\x7c" + int4[10:],
            "scale_below_zero": int4[:8] + b"\0\xbc" + int4[10:],
            "scale_that_is_not_a_number": int4[:8] + b"\0\x7e" + int4[10:],
            "one_byte_more": int4 + b"\0",
            "one_byte_less": int4[:-1],
            "header_alone": int4[:8],
        },
        "token": {"of_version_2": b"shoal2.e30", "prefix_alone": b"shoal1.", "empty_object": b"shoal1.e30"},
        "bitmap": {"too_long": b"\x03\x07\x00", "beyond_the_last": b"\x03\x0f", "too_short": b"\x09\xff"},
        "topic": {
            "another_version": b"fl/2/acme/wrists/rd/now",
            "another_fleet": b"fl/1/acme/ankles/rd/now",
            "wildcard": b"fl/1/acme/wrists/st/+",
            "leading_zero": b"fl/1/acme/wrists/rd/01",
            "upper_case_hash": b"fl/1/acme/wrists/bl/" + b"AB" * 32 + b"/0",
            "newline": b"fl/1/acme/wrists/st/watch-1\n",
            "one_level_more": b"fl/1/acme/wrists/st/watch-1/x",
        },
    }  # fmt: skip
    return {decoder: {name: data.hex() for name, data in cases.items()} for decoder, cases in found.items()}


REPLAYS: dict[str, Sequence[tuple[int, int, str]]] = {
    "in_order": [(1, 0, "in"), (1, 1, "in"), (1, 2, "in")],
    "out_of_order": [(1, 5, "in"), (1, 3, "in"), (1, 4, "in"), (1, 3, "seen")],
    "twice": [(1, 7, "in"), (1, 7, "seen")],
    "63_behind": [(1, 100, "in"), (1, 37, "in"), (1, 37, "seen")],
    "64_behind": [(1, 100, "in"), (1, 36, "behind")],
    "jump_of_64_forgets_the_past": [(1, 0, "in"), (1, 64, "in"), (1, 0, "behind"), (1, 1, "in")],
    "newer_epoch_starts_anew": [(1, 900, "in"), (2, 0, "in"), (2, 0, "seen"), (1, 901, "behind")],
    "older_epoch": [(3, 1, "in"), (2, 2, "behind")],
    "largest_numbers": [(2**63 - 1, 2**63 - 1, "in"), (2**63 - 1, 2**63 - 1, "seen")],
    "beyond_63_bits": [(2**63, 0, "behind"), (0, 2**63, "behind")],
}
"""Numbers as they arrive and what becomes of each: let in, `seen` or `behind` (clause 9.2)."""


def replay_vectors() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "arrivals": [
                {"epoch": epoch, "seq": seq, "verdict": verdict} for epoch, seq, verdict in arrivals
            ],
        }
        for name, arrivals in REPLAYS.items()
    ]
