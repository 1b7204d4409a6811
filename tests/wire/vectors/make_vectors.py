"""Writes the test vectors of the wire: `python -m tests.wire.vectors.make_vectors`.

Keys, headers and bodies are fixed (tests/wire/parties.py). Sealing draws a content key, an IV and HPKE's own
randomness, so sealed messages differ from run to run: what lies in envelope.json must open (or fail) for ever, and is
kept; only vectors of new names are added. codec.json may differ with another numpy or zlib, and must decode for ever.
bytes.json, refused.json and replay.json come out the same every time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tests.wire.parties import (
    CLOUD_KEY,
    DEVICE_KEY,
    KEM,
    KEMS,
    NOW,
    OTHER_KEY,
    STRANGER_KEY,
    down_header,
    up_header,
)
from tests.wire.test_messages import EXAMPLES
from tests.wire.vectors.refusals import refused_bytes, refused_envelopes, replay_vectors
from wire.cbor import decode_canonical, encode_canonical
from wire.chunks import split
from wire.codec import encode
from wire.cose import read_sign1, sign1
from wire.envelope import seal, sign
from wire.header import header_bytes, header_to_map
from wire.messages import CODEC_NAMES, encode_body
from wire.primitives import SigningKey

FOLDER = Path(__file__).parent
BODY = b"Nothing acknowledged is lost, nothing is counted twice. " * 40


def opens(name: str, kind: str, message: bytes, body: bytes) -> dict[str, Any]:
    return {"name": name, "kind": kind, "message": message.hex(), "body": body.hex()}


def fails(name: str, kind: str, message: bytes, reason: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "message": message.hex(), "reason": reason}


def envelope_vectors() -> list[dict[str, Any]]:
    """Messages that open as the cloud (`sealed`) or as watch-1 (`signed`), and ones that fail for one reason."""
    sealed = seal(up_header(), BODY, signer=DEVICE_KEY, recipient=KEM.public_key)
    signed = sign(down_header(), b"a receipt", signer=CLOUD_KEY)
    vectors = [
        opens("x25519_a256gcm", "sealed", sealed, BODY),
        opens("receipt", "signed", signed, b"a receipt"),
    ]
    for algorithm, key in KEMS.items():
        for content in ("A256GCM", "C20P"):
            message = seal(
                up_header(seq=1),
                BODY,
                signer=DEVICE_KEY,
                recipient=key.public_key,
                content_algorithm=content,
                pad=True,
                record_bytes=1024,
            )
            vectors.append(opens(f"{algorithm}_{content}_padded_in_records", "sealed", message, BODY))
    empty = seal(
        up_header(run="", base=b"", round_number=0), b"", signer=DEVICE_KEY, recipient=KEM.public_key
    )
    vectors.append(opens("empty_body", "sealed", empty, b""))
    hint = sign(down_header(type="md", device="*"), b"news", signer=CLOUD_KEY, extensions={-1: b"ignorable"})
    vectors.append(opens("broadcast_with_ignorable_extension", "signed", hint, b"news"))
    return vectors + failing_vectors(sealed, signed)


def failing_vectors(sealed: bytes, signed: bytes) -> list[dict[str, Any]]:
    def updated(signer: SigningKey = DEVICE_KEY, **changes: Any) -> bytes:
        return seal(up_header(**changes), BODY, signer=signer, recipient=KEM.public_key)

    stranger = seal(up_header(), BODY, signer=STRANGER_KEY, recipient=KEM.public_key)
    critical = sign(down_header(), b"a receipt", signer=CLOUD_KEY, extensions={1: b"must be known"})
    return [
        fails("one_bit_of_the_ciphertext", "sealed", sealed[:-1] + bytes([sealed[-1] ^ 1]), "digest"),
        fails("one_bit_of_the_signature", "signed", signed[:-1] + bytes([signed[-1] ^ 1]), "signature"),
        fails("one_byte_more", "sealed", sealed + b"\0", "size"),
        fails("one_byte_less", "sealed", sealed[:-1], "size"),
        fails("length_beyond_the_end", "signed", b"\0\0\xff\xff" + signed[4:], "size"),
        fails("another_tag", "signed", signed[:4] + b"\xd1" + signed[5:], "cbor"),
        fails("stranger", "sealed", stranger, "signer"),
        fails("signed_by_another_device", "sealed", updated(OTHER_KEY), "sender"),
        fails("of_another_device", "sealed", updated(OTHER_KEY, device="watch-2"), "device"),
        fails("another_fleet", "sealed", updated(fleet="ankles"), "fleet"),
        fails("another_tenant", "sealed", updated(tenant="rival"), "fleet"),
        fails("another_type", "sealed", updated(type="tm"), "type"),
        fails("downward_by_a_device", "signed", sign(down_header(), b"", signer=DEVICE_KEY), "sender"),
        fails("receipt_for_another", "signed", sign(down_header(device="watch-2"), b"", signer=CLOUD_KEY), "device"),
        fails("receipt_for_all", "signed", sign(down_header(device="*"), b"", signer=CLOUD_KEY), "device"),
        fails("expired", "sealed", updated(expiry=int(NOW) - 100), "expired"),
        fails("critical_extension", "signed", critical, "extension"),
        *tampered_vectors(sealed),
    ]  # fmt: skip


def tampered_vectors(sealed: bytes) -> list[dict[str, Any]]:
    """Changed and signed again by the device itself."""
    end = 4 + int.from_bytes(sealed[:4], "big")
    payload = read_sign1(sealed[4:end], limit_bytes=end).payload

    def changed(change: Callable[[list[Any]], None]) -> bytes:
        content = decode_canonical(payload, limit_bytes=end)
        change(content)
        head = sign1(encode_canonical(content), DEVICE_KEY)
        return len(head).to_bytes(4, "big") + head + sealed[end:]

    def set_at(at: int, value: object) -> Callable[[list[Any]], None]:
        return lambda content: content.__setitem__(at, value)

    return [
        fails("header_of_another_round", "sealed", changed(set_at(0, header_to_map(up_header(round_number=8)))), "key"),
        fails("header_with_unknown_key", "sealed", changed(set_at(0, header_to_map(up_header()) | {16: 0})), "header"),
        fails("padding_that_is_none", "sealed", changed(set_at(2, [len(BODY), 98_304, True])), "padding"),
        fails("another_record_size", "sealed", changed(set_at(2, [len(BODY), 1024, False])), "structure"),
        fails("two_recipients", "sealed", changed(lambda c: c[1][3].append(c[1][3][0])), "structure"),
        fails("content_of_four", "sealed", changed(lambda c: c.pop()), "structure"),
    ]  # fmt: skip


def byte_vectors() -> dict[str, Any]:
    """Everything on the wire that has exactly one byte string."""
    return {
        "headers": {
            "update": header_bytes(up_header()).hex(),
            "receipt": header_bytes(down_header()).hex(),
            "broadcast": header_bytes(down_header(type="rd", device="*", part=1, parts=3)).hex(),
        },
        "bodies": {body.TYPE: encode_body(body).hex() for body in EXAMPLES},
        "fields": {
            body.TYPE: json.loads(msgspec.json.encode(msgspec.to_builtins(body))) for body in EXAMPLES
        },
        "chunks": [chunk.hex() for chunk in split(bytes(range(250)), 256)],
    }


def codec_vectors() -> list[dict[str, Any]]:
    vector = np.random.default_rng(20).laplace(size=600).astype(np.float32) * np.float32(0.01)
    vector[300:560] = 0
    return [
        {
            "codec": codec,
            "params_size": len(vector),
            "data": encode(vector, codec, np.random.default_rng(21)).hex(),
            "vector": vector.astype("<f4").tobytes().hex(),
        }
        for codec in CODEC_NAMES
    ]


def write(name: str, value: object) -> None:
    (FOLDER / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def kept(name: str, fresh: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is stored, which must open or fail for ever, and the vectors whose names are new."""
    path = FOLDER / name
    old: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    names = {vector["name"] for vector in old}
    return old + [vector for vector in fresh if vector["name"] not in names]


if __name__ == "__main__":
    refused = [fails(*refusal) for refusal in refused_envelopes()]
    write("envelope.json", kept("envelope.json", envelope_vectors() + refused))
    write("refused.json", refused_bytes())
    write("replay.json", replay_vectors())
    write("bytes.json", byte_vectors())
    write("codec.json", codec_vectors())
