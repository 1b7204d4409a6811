"""Keys, HPKE, AEAD and key files: published vectors, strict bytes, files that only their owner can read."""

from __future__ import annotations

import itertools
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given
from hypothesis import strategies as st

from wire.errors import ConfigurationError, EnvelopeError, StorageError, TrustError
from wire.primitives import (
    CONTENT_ALGORITHMS,
    KEM_ALGORITHMS,
    Aead,
    KemPrivateKey,
    KemPublicKey,
    SigningKey,
    VerifyKey,
    certificate_fingerprint,
    certificate_not_after,
    faster_content_algorithm,
    generate_tls_key,
    make_csr,
    read_private,
    sha256,
    tls_key_from_seed,
    write_private,
)

SEED = bytes(range(32))


# --- signatures ---


def test_signature_is_that_of_rfc_8032() -> None:
    key = SigningKey.from_bytes(
        bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    )
    assert key.public_bytes.hex() == "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert key.sign(b"").hex() == (
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b"
    )


def test_signing_key_survives_its_bytes_and_names_itself() -> None:
    key = SigningKey.generate()
    again = SigningKey.from_bytes(key.private_bytes())
    assert again.public_bytes == key.public_bytes
    assert key.key_id == sha256(key.public_bytes)[:8] == key.verify_key.key_id
    assert key.private_bytes().hex() not in repr(key)
    assert SigningKey.generate().key_id != key.key_id


def test_verifying_refuses_another_message_key_or_signature() -> None:
    key = SigningKey.from_bytes(SEED)
    signature = key.sign(b"message")
    key.verify_key.verify(signature, b"message")
    for other, sent, data in (
        (key.verify_key, signature, b"massage"),
        (SigningKey.generate().verify_key, signature, b"message"),
        (key.verify_key, signature[:-1], b"message"),
        (key.verify_key, bytes(64), b"message"),
        (key.verify_key, b"", b"message"),
    ):
        with pytest.raises(EnvelopeError) as caught:
            other.verify(sent, data)
        assert caught.value.reason == "signature"


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_key_of_another_size_is_refused(size: int) -> None:
    for make in (SigningKey.from_bytes, VerifyKey, tls_key_from_seed):
        with pytest.raises(TrustError):
            make(bytes(size))
    for algorithm in KEM_ALGORITHMS:
        with pytest.raises(TrustError):
            KemPrivateKey.from_bytes(algorithm, bytes(size))
        with pytest.raises(TrustError):
            KemPublicKey(algorithm, bytes(size))


# --- HPKE ---


def test_hybrid_key_is_that_of_the_xwing_draft() -> None:
    key = KemPrivateKey.from_bytes(
        "mlkem768-x25519",
        bytes.fromhex("7f9c2ba4e88f827d616045507605853ed73b8093f6efbc88eb1a6eacfa66ef26"),
    )
    public = key.public_key.public_bytes.hex()
    assert public.startswith(
        "e2236b35a8c24b39b10aa1323a96a919a2ced88400633a7b07131713fc14b2b5b19cfc3da5fa1a92"
    )
    assert len(public) == 2 * 1216


@pytest.mark.parametrize("algorithm", KEM_ALGORITHMS)
def test_wrapped_key_unwraps_for_its_owner_and_purpose_only(algorithm: str) -> None:
    owner = KemPrivateKey.from_bytes(algorithm, SEED)
    public = KemPublicKey(algorithm, owner.public_key.public_bytes)
    encapsulated, wrapped = public.wrap(b"k" * 32, info=b"purpose")
    assert owner.unwrap(encapsulated, wrapped, info=b"purpose") == b"k" * 32
    stranger = KemPrivateKey.generate(algorithm)
    for key, sent, sealed, info in (
        (stranger, encapsulated, wrapped, b"purpose"),
        (owner, encapsulated, wrapped, b"another"),
        (owner, encapsulated[:-1], wrapped, b"purpose"),
        (owner, encapsulated[:-1], encapsulated[-1:] + wrapped, b"purpose"),
        (owner, bytes(len(encapsulated)), wrapped, b"purpose"),
        (owner, encapsulated, wrapped[:-1], b"purpose"),
        (owner, encapsulated, b"", b"purpose"),
    ):
        with pytest.raises(EnvelopeError) as caught:
            key.unwrap(sent, sealed, info=info)
        assert caught.value.reason == "key"


@pytest.mark.parametrize("algorithm", KEM_ALGORITHMS)
def test_private_kem_key_survives_its_bytes(algorithm: str) -> None:
    key = KemPrivateKey.generate(algorithm)
    again = KemPrivateKey.from_bytes(algorithm, key.private_bytes())
    assert again.key_id == key.key_id == key.public_key.key_id
    assert key.private_bytes().hex() not in repr(key)


def test_unknown_algorithm_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(TrustError) as caught:
        KemPublicKey("rsa", bytes(32))
    assert "x25519" in caught.value.hint


def test_public_key_of_low_order_is_not_sealed_to() -> None:
    with pytest.raises(TrustError):
        KemPublicKey("x25519", bytes(32)).wrap(b"k" * 32, info=b"")


# --- AEAD ---


@pytest.mark.parametrize("algorithm", CONTENT_ALGORITHMS)
@given(data=st.binary(max_size=100))
def test_aead_opens_what_it_sealed_and_nothing_else(algorithm: str, data: bytes) -> None:
    aead = Aead(algorithm, b"k" * 32)
    sealed, opened = bytearray(len(data) + 16), bytearray(len(data))
    aead.seal_into(bytes(12), memoryview(data), b"aad", memoryview(sealed))
    aead.open_into(bytes(12), memoryview(sealed), b"aad", memoryview(opened))
    assert opened == data
    damaged = bytearray(sealed)
    damaged[0] ^= 1
    for nonce, ciphertext, aad in (
        (bytes(12), damaged, b"aad"),
        (bytes(12), sealed, b"add"),
        (b"\1" * 12, sealed, b"aad"),
    ):
        with pytest.raises(EnvelopeError):
            aead.open_into(nonce, memoryview(ciphertext), aad, memoryview(opened))


def test_aead_refuses_short_input_and_unknown_names() -> None:
    with pytest.raises(EnvelopeError):
        Aead("A256GCM", b"k" * 32).open_into(bytes(12), memoryview(b"short"), b"", memoryview(bytearray(0)))
    for algorithm, key in (("A256GCM", b"k" * 16), ("A128GCM", b"k" * 32)):
        with pytest.raises(EnvelopeError):
            Aead(algorithm, key)


@pytest.mark.parametrize(
    ("gcm_seconds", "chacha_seconds", "wanted"),
    [(1.0, 5.0, "A256GCM"), (5.0, 1.0, "C20P"), (1.0, 1.0, "A256GCM"), (1.0, 0.95, "A256GCM")],
)
def test_content_algorithm_is_the_one_that_takes_less_time(
    gcm_seconds: float, chacha_seconds: float, wanted: str
) -> None:
    """The clock is read before and after each trial, AES-256-GCM's and ChaCha20-Poly1305's in turn."""
    steps = itertools.cycle((0.0, gcm_seconds, 0.0, chacha_seconds))
    clock = itertools.accumulate(steps)
    assert faster_content_algorithm(lambda: next(clock)) == wanted


def test_content_algorithm_is_not_chosen_by_a_disturbed_trial() -> None:
    steps = itertools.chain((0.0, 9.0, 0.0, 2.0), itertools.cycle((0.0, 1.0, 0.0, 2.0)))
    clock = itertools.accumulate(steps)
    assert faster_content_algorithm(lambda: next(clock)) == "A256GCM"


# --- key files ---


def test_private_file_is_for_its_owner_only_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "update.key"
    previous = os.umask(0)
    try:
        write_private(path, SEED)
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_private(path) == SEED
    write_private(path, b"another")
    assert read_private(path) == b"another"
    assert [child.name for child in tmp_path.iterdir()] == ["update.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o777])
def test_private_file_that_others_can_reach_is_refused_with_a_hint(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "update.key"
    write_private(path, SEED)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=f"{mode:04o}") as caught:
        read_private(path)
    assert caught.value.hint == f"chmod 600 {path}"


def test_private_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        read_private(tmp_path / "missing")
    with pytest.raises((ConfigurationError, StorageError)):
        read_private(tmp_path)
    long = tmp_path / "long.key"
    write_private(long, bytes(70_000))
    with pytest.raises(ConfigurationError, match="too long"):
        read_private(long)


def test_private_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        write_private(tmp_path / "no folder" / "update.key", SEED)
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError):
        write_private(tmp_path / "taken", SEED)
    assert [child.name for child in tmp_path.iterdir()] == ["taken"]


# --- TLS ---


def test_request_carries_the_name_and_is_signed_by_the_key() -> None:
    key_pem = tls_key_from_seed(SEED)
    request = x509.load_pem_x509_csr(make_csr(key_pem, "watch-1"))
    assert request.is_signature_valid
    assert request.subject.rfc4514_string() == "CN=watch-1"
    assert generate_tls_key() != generate_tls_key()


@pytest.mark.parametrize(
    ("key_pem", "name"), [(b"no pem", "watch-1"), (b"", "watch-1"), (None, ""), (None, "x" * 65)]
)
def test_request_that_cannot_be_made_is_refused(key_pem: bytes | None, name: str) -> None:
    with pytest.raises(TrustError):
        make_csr(tls_key_from_seed(SEED) if key_pem is None else key_pem, name)


def test_certificate_tells_its_fingerprint_and_its_end() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "watch-1")])
    end = datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(end - timedelta(days=7))
        .not_valid_after(end)
        .sign(key, None)
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    assert certificate_fingerprint(pem) == sha256(certificate.public_bytes(serialization.Encoding.DER))
    assert certificate_not_after(pem) == end.timestamp()
    for damaged in (b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", pem[:-100]):
        with pytest.raises(TrustError):
            certificate_fingerprint(damaged)
