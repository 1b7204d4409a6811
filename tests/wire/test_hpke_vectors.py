"""Our key wrapping against the vectors of RFC 9180 and draft-ietf-hpke-pq, out of the `cryptography-vectors` package.

The vectors were made with additional data for each message, and ours is always empty. So RFC 9180's key schedule stands
here once more (§4, §5.1), is checked against the key and nonce of a vector, and then seals what our side must unwrap.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import cryptography_vectors
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from wire.errors import EnvelopeError
from wire.primitives import KemPrivateKey

X25519, MLKEM768_X25519 = 0x0020, 0x647A
HKDF_SHA256, AES_128_GCM, AES_256_GCM, CHACHA = 1, 1, 2, 3
KEY_BYTES = {AES_128_GCM: 16, AES_256_GCM: 32, CHACHA: 32}
# The vector of each KEM with our KDF, and the AEAD that we use with it.
SUITES = {
    "x25519": (X25519, AES_128_GCM, AES_128_GCM),
    "mlkem768-x25519": (MLKEM768_X25519, CHACHA, AES_256_GCM),
}


def vector_of(algorithm: str) -> dict[str, Any]:
    """The base-mode vector of the algorithm's KEM with HKDF-SHA256, its byte strings decoded."""
    kem, aead, _ = SUITES[algorithm]
    name = "test-vectors.json" if algorithm == "x25519" else "hpke-pq-test-vectors.json"
    with cryptography_vectors.open_vector_file(f"HPKE/{name}", "r") as file:
        wanted = (0, kem, HKDF_SHA256, aead)
        (found,) = (
            one
            for one in json.load(file)
            if (one["mode"], one["kem_id"], one["kdf_id"], one["aead_id"]) == wanted
        )
    return {name: bytes.fromhex(value) if isinstance(value, str) else value for name, value in found.items()}


def extract(salt: bytes, data: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), data, "sha256")


def expand(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF-Expand (RFC 5869) of at most one block."""
    return hmac.digest(secret, info + b"\x01", "sha256")[:length]


def key_schedule(kem: int, aead: int, shared_secret: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Key and base nonce of base mode (RFC 9180 §5.1)."""
    suite = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (kem, HKDF_SHA256, aead))

    def labeled_extract(salt: bytes, label: bytes, data: bytes) -> bytes:
        return extract(salt, b"HPKE-v1" + suite + label + data)

    context = b"\0" + labeled_extract(b"", b"psk_id_hash", b"") + labeled_extract(b"", b"info_hash", info)
    secret = labeled_extract(shared_secret, b"secret", b"")

    def labeled_expand(label: bytes, length: int) -> bytes:
        return expand(secret, length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + context, length)

    return labeled_expand(b"key", KEY_BYTES[aead]), labeled_expand(b"base_nonce", 12)


@pytest.mark.parametrize("algorithm", SUITES)
def test_private_key_of_the_vector_has_its_public_key(algorithm: str) -> None:
    vector = vector_of(algorithm)
    assert KemPrivateKey(algorithm, vector["skRm"]).public_key.public_bytes == vector["pkRm"]


@pytest.mark.parametrize("algorithm", SUITES)
def test_second_key_schedule_gives_the_keys_of_the_vector(algorithm: str) -> None:
    vector = vector_of(algorithm)
    kem, aead, _ = SUITES[algorithm]
    key, nonce = key_schedule(kem, aead, vector["shared_secret"], vector["info"])
    assert (key, nonce) == (vector["key"], vector["base_nonce"])
    cipher = ChaCha20Poly1305(key) if aead == CHACHA else AESGCM(key)
    first = {name: bytes.fromhex(value) for name, value in vector["encryptions"][0].items()}
    assert cipher.encrypt(nonce, first["pt"], first["aad"]) == first["ct"]


@pytest.mark.parametrize("algorithm", SUITES)
def test_key_wrapped_by_the_vector_unwraps(algorithm: str) -> None:
    vector = vector_of(algorithm)
    kem, _, ours = SUITES[algorithm]
    key, nonce = key_schedule(kem, ours, vector["shared_secret"], vector["info"])
    content_key = hashlib.sha256(b"a content key").digest()
    wrapped = AESGCM(key).encrypt(nonce, content_key, b"")
    private = KemPrivateKey(algorithm, vector["skRm"])
    assert private.unwrap(vector["enc"], wrapped, info=vector["info"]) == content_key
    with pytest.raises(EnvelopeError):
        private.unwrap(vector["enc"], wrapped, info=vector["info"] + b"\0")
