"""The stored vectors against our code, and against a second reading of docs/protocol.md made for this test.

The second implementation below knows nothing of `wire/`: it opens messages by the letter of clauses 4 and 5 with
cbor2 and cryptography alone, and undoes `dithered` by clause 8 one value at a time.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite

from tests.fuzz.decoders import DECODERS
from tests.wire.parties import SIGNERS, open_down, open_up
from tests.wire.vectors.make_vectors import byte_vectors
from tests.wire.vectors.refusals import refused_bytes, replay_vectors
from wire.chunks import parse
from wire.codec import decode
from wire.envelope import Opened
from wire.errors import EnvelopeError, ReplayError, ShoalError
from wire.messages import BODIES, decode_body, encode_body
from wire.replay import Window

FOLDER = Path(__file__).parent / "vectors"


def load(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


ENVELOPES: list[dict[str, Any]] = load("envelope.json")
GOOD = [vector for vector in ENVELOPES if "body" in vector]
BAD = [vector for vector in ENVELOPES if "reason" in vector]


def open_vector(vector: dict[str, Any], **changes: Any) -> Opened:
    message = bytes.fromhex(vector["message"])
    return open_up(message, **changes) if vector["kind"] == "sealed" else open_down(message, **changes)


@pytest.mark.parametrize("vector", GOOD, ids=lambda vector: vector["name"])
def test_stored_message_opens(vector: dict[str, Any]) -> None:
    assert open_vector(vector).body == bytes.fromhex(vector["body"])


@pytest.mark.parametrize("vector", BAD, ids=lambda vector: vector["name"])
def test_stored_message_fails_for_its_reason(vector: dict[str, Any]) -> None:
    with pytest.raises(EnvelopeError) as caught:
        # Every enrolled key is known, so that what fails is not just the key.
        open_vector(vector, signers=SIGNERS)
    assert caught.value.reason == vector["reason"]


def test_stored_failures_cover_every_reason_of_the_protocol() -> None:
    reasons = (
        "size cbor structure algorithm signature signer header direction fleet type sender device expired extension "
        "recipient key digest content padding"
    )
    assert {vector["reason"] for vector in BAD} == set(reasons.split())
    assert len({vector["name"] for vector in ENVELOPES}) == len(ENVELOPES)


REFUSED: dict[str, dict[str, str]] = load("refused.json")
DECODE = {decoder.name: decoder.decode for decoder in DECODERS}


@pytest.mark.parametrize(
    ("decoder", "name"), [(decoder, name) for decoder, cases in REFUSED.items() for name in cases]
)
def test_stored_bytes_are_refused(decoder: str, name: str) -> None:
    with pytest.raises(ShoalError):
        DECODE[decoder](bytes.fromhex(REFUSED[decoder][name]))


@pytest.mark.parametrize("vector", load("replay.json"), ids=lambda vector: vector["name"])
def test_stored_arrivals_move_the_window_as_they_did(vector: dict[str, Any]) -> None:
    window = Window()
    for arrival in vector["arrivals"]:
        try:
            window = Window.from_row(*window.accept(arrival["epoch"], arrival["seq"]).to_row())
            verdict = "in"
        except ReplayError as error:
            verdict = error.reason
        assert verdict == arrival["verdict"], arrival


def test_refusals_are_what_they_were() -> None:
    assert refused_bytes() == REFUSED
    assert replay_vectors() == load("replay.json")


def test_bytes_are_what_they_were() -> None:
    assert byte_vectors() == load("bytes.json")


def test_stored_bodies_and_chunks_read_back() -> None:
    stored = load("bytes.json")
    for kind, data in stored["bodies"].items():
        assert encode_body(decode_body(bytes.fromhex(data), BODIES[kind])).hex() == data
    chunks = [parse(bytes.fromhex(data)) for data in stored["chunks"]]
    assert b"".join(chunk.piece for chunk in chunks) == bytes(range(250))


@pytest.mark.parametrize("vector", load("codec.json"), ids=lambda vector: vector["codec"])
def test_stored_update_decodes(vector: dict[str, Any]) -> None:
    decoded = decode(bytes.fromhex(vector["data"]), vector["codec"], vector["params_size"])
    wanted = np.frombuffer(bytes.fromhex(vector["vector"]), "<f4")
    assert np.abs(decoded - wanted).max() <= {"fp32": 0, "fp16": 1e-4, "int8": 1e-3}.get(vector["codec"], 0.1)


# --- the second implementation ---

SEEDS = {
    "device": b"device".ljust(32, b"\0"),
    "cloud": b"cloud orders".ljust(32, b"\0"),
    49: b"cloud kem".ljust(32, b"\0"),
    -70001: b"cloud hybrid kem".ljust(32, b"\0"),
}


def private_kem(algorithm: int) -> tuple[Suite, Any, int]:
    seed = SEEDS[algorithm]
    if algorithm == 49:
        suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)
        return suite, x25519.X25519PrivateKey.from_private_bytes(seed), 32
    expanded = hashlib.shake_256(seed).digest(96)
    key = MLKEM768X25519PrivateKey(
        mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64]),
        x25519.X25519PrivateKey.from_private_bytes(expanded[64:]),
    )
    return Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM), key, 1120


def by_the_letter(message: bytes, seed: bytes) -> bytes:
    """Clause 5, for a message that is known to be good; returns the body."""

    def cbor(value: object) -> bytes:
        return cbor2.dumps(value, canonical=True)

    (length,) = struct.unpack(">I", message[:4])
    head, ciphertext = message[4 : 4 + length], message[4 + length :]
    protected, _, payload, signature = cbor2.loads(head[1:])
    assert head[:1] == b"\xd2"
    key = ed25519.Ed25519PrivateKey.from_private_bytes(seed).public_key()
    key.verify(signature, cbor(["Signature1", protected, b"", payload]))
    content = cbor2.loads(payload)
    if len(content) == 3:
        return bytes(content[1])
    header, (content_protected, unprotected, _, [[to, sent, wrapped]]), sizes, hashes, _ = content
    size, record_bytes, padded = sizes
    algorithm = cbor2.loads(content_protected)[1]
    suite, private, _ = private_kem(cbor2.loads(to)[1])
    info = cbor(["HPKE Recipient", algorithm, to, cbor(header)])
    content_key = suite.decrypt(sent[-4] + wrapped, private, info=info)
    cipher = AESGCM(content_key) if algorithm == 3 else ChaCha20Poly1305(content_key)
    plaintext, count = b"", max(1, -(-size // record_bytes))
    for index in range(count):
        record = ciphertext[index * (record_bytes + 16) : (index + 1) * (record_bytes + 16)]
        assert hashlib.sha256(record).digest() == hashes[32 * index : 32 * index + 32]
        nonce = (int.from_bytes(unprotected[5], "big") ^ index).to_bytes(12, "big")
        external = cbor([cbor(header), index, index == count - 1])
        plaintext += cipher.decrypt(nonce, record, cbor(["Encrypt", content_protected, external]))
    assert len(plaintext) == size
    return plaintext.rstrip(b"\0")[:-1] if padded else plaintext


@pytest.mark.parametrize("vector", GOOD, ids=lambda vector: vector["name"])
def test_stored_message_opens_by_the_letter_of_the_protocol(vector: dict[str, Any]) -> None:
    seed = SEEDS["device" if vector["kind"] == "sealed" else "cloud"]
    assert by_the_letter(bytes.fromhex(vector["message"]), seed).hex() == vector["body"]


def test_stored_dithered_update_decodes_by_the_letter_of_the_protocol() -> None:
    vector = next(one for one in load("codec.json") if one["codec"] == "dithered")
    data, size = bytes.fromhex(vector["data"]), vector["params_size"]
    number, flags, block, said = struct.unpack("<BBHI", data[:8])
    assert (number, flags, block, said) == (7, 1, 256, size)
    seed, codes = int.from_bytes(data[8:16], "little"), data[16 : 16 + -(-size // 256)]
    pairs = zlib.decompress(data[16 + len(codes) :], -15)
    values = []
    for n in range(size):
        z = (seed + (n // 4 + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
        noise = (((z ^ z >> 31) >> 16 * (n % 4) & 0xFFFF) - 32767.5) / 65536
        symbol = divmod(pairs[n // 2], 15)[n % 2] - 7
        code = codes[n // 256]
        values.append((symbol - noise) * (2 ** ((code - 191) / 8) if code else 0))
    np.testing.assert_allclose(decode(data, "dithered", size), values, rtol=1e-5, atol=1e-9)
