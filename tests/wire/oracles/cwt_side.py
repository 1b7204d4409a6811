"""The other side of tests/wire/test_cwt.py: runs in an environment that has `cwt` and nothing of Shoal.

Reads one JSON request from stdin and answers with one on stdout; all bytes are hex. `open` verifies and decrypts a
message with cwt's COSE; `seal` makes a message of ours out of cwt's COSE_Sign1 and COSE_Encrypt. What is not COSE
(framing, records, nonces) is done here by the letter of docs/protocol.md, clause 5.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import cbor2
from cwt import COSE, COSEKey, COSEMessage, Recipient

TAG_SIGN1, TAG_ENCRYPT, TAG_BYTES = 18, 96, 16
ED25519, EDDSA, HPKE_3_KE, A256GCM = 6, -8, 49, 3


def cbor(value: object) -> bytes:
    return cbor2.dumps(value, canonical=True)


def signature_key(request: dict[str, str], operation: int) -> Any:
    """An OKP key of COSE (RFC 9053 §7.2) with the private part if there is one."""
    plain = {1: 1, 3: EDDSA, -1: ED25519, 2: bytes.fromhex(request["signer_id"]), 4: [operation]}
    plain[-2] = bytes.fromhex(request["signer_public"])
    if "signer_private" in request:
        plain[-4] = bytes.fromhex(request["signer_private"])
    return COSEKey.new(plain)


def kem_key(request: dict[str, str]) -> Any:
    plain = {1: 1, 3: HPKE_3_KE, -1: 4, 2: bytes.fromhex(request["kem_id"]), 4: []}
    plain[-2] = bytes.fromhex(request["kem_public"])
    if "kem_private" in request:
        plain |= {-4: bytes.fromhex(request["kem_private"]), 4: [8]}
    return COSEKey.new(plain)


def external(header: bytes, index: int, count: int) -> bytes:
    return cbor([header, index, index == count - 1])


def shifted(iv: bytes, index: int) -> bytes:
    return (int.from_bytes(iv, "big") ^ index).to_bytes(12, "big")


def open_message(request: dict[str, str]) -> dict[str, str]:
    message = bytes.fromhex(request["message"])
    end = 4 + int.from_bytes(message[:4], "big")
    head, ciphertext = message[4:end], message[end:]
    payload = COSE.new().decode(head, signature_key(request, 2))
    header, encrypt, (size, record_bytes, _), hashes, _ = cbor2.loads(payload)
    protected, clear, nothing, recipients = encrypt
    assert nothing is None
    count, bound = max(1, -(-size // record_bytes)), cbor(header)
    plaintext = b""
    for index in range(count):
        record = ciphertext[index * (record_bytes + TAG_BYTES) : (index + 1) * (record_bytes + TAG_BYTES)]
        assert hashlib.sha256(record).digest() == hashes[32 * index : 32 * index + 32]
        one = [protected, {**clear, 5: shifted(clear[5], index)}, None, recipients]
        plaintext += COSE.new().decode(
            cbor2.dumps(cbor2.CBORTag(TAG_ENCRYPT, one)),
            kem_key(request),
            external_aad=external(bound, index, count),
            detached_payload=record,
            extra_info=bound,
        )
    return {"plaintext": plaintext.hex(), "header": bound.hex()}


def seal_message(request: dict[str, str]) -> dict[str, str]:
    """One record, because cwt draws the IV for us."""
    header, body = cbor2.loads(bytes.fromhex(request["header"])), bytes.fromhex(request["body"])
    bound = cbor(header)
    recipient = Recipient.new(
        protected={1: HPKE_3_KE, 4: bytes.fromhex(request["kem_id"])},
        recipient_key=kem_key(request),
        extra_info=bound,
    )
    sealed = COSE.new().encode(
        body,
        COSEKey.generate_symmetric_key(alg="A256GCM"),
        protected={1: A256GCM},
        recipients=[recipient],
        external_aad=external(bound, 0, 1),
    )
    protected, clear, record, recipients = cbor2.loads(sealed).value
    encrypt = [protected, clear, None, recipients]
    sizes = [len(body), 98_304, False]
    payload = cbor([header, encrypt, sizes, hashlib.sha256(record).digest(), {}])
    signed = COSE.new().encode(
        payload,
        signature_key(request, 1),
        protected={1: EDDSA, 3: "application/shoal+cose", 4: bytes.fromhex(request["signer_id"])},
    )
    head = cbor2.dumps(cbor2.loads(signed), canonical=True)
    assert isinstance(COSEMessage.loads(head), COSEMessage)
    return {"message": (len(head).to_bytes(4, "big") + head + record).hex()}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    json.dump({"open": open_message, "seal": seal_message}[asked["do"]](asked), sys.stdout)
