"""The one door to `cryptography`: keys, signatures, HPKE, AEAD, hashes, key files, TLS keys and requests.

Laws of the file: nothing of `cryptography` leaves it (neither types nor exceptions); a failure to verify or
decrypt is an `EnvelopeError` that says nothing but its `reason`; private bytes reach a disk only through
`write_private` (0600, atomic, durable). Sources: RFC 8032 (Ed25519), RFC 9180 (HPKE), draft-ietf-hpke-pq
(MLKEM768-X25519), RFC 5116 (AEAD), RFC 7748 (X25519), RFC 5869 (HKDF), SP 800-38A (CTR).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import stat
from collections.abc import Callable
from datetime import UTC
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.bindings._rust import openssl as binding
from cryptography.hazmat.primitives.asymmetric import ed25519, mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)

from wire.errors import ConfigurationError, EnvelopeError, StorageError, TrustError

if TYPE_CHECKING:
    from cryptography import x509

KemAlgorithm = Literal["x25519", "mlkem768-x25519"]
ContentAlgorithm = Literal["A256GCM", "C20P"]

KEM_ALGORITHMS: Final[tuple[KemAlgorithm, ...]] = ("x25519", "mlkem768-x25519")
CONTENT_ALGORITHMS: Final[tuple[ContentAlgorithm, ...]] = ("A256GCM", "C20P")

KEY_ID_BYTES: Final = 8
SEED_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
CONTENT_KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
_TRIAL_BYTES: Final = 65_536
_TRIALS: Final = 7
_MLKEM_SEED_BYTES: Final = 64
_MLKEM_PUBLIC_BYTES: Final = 1184
_MAX_KEY_FILE_BYTES: Final = 65_536

_PUBLIC_BYTES: Final[dict[str, int]] = {"x25519": 32, "mlkem768-x25519": _MLKEM_PUBLIC_BYTES + 32}
_ENCAPSULATED_BYTES: Final[dict[str, int]] = {"x25519": 32, "mlkem768-x25519": 1120}
# The X25519 suite is HPKE-3-KE of draft-ietf-cose-hpke; the hybrid's 256-bit AEAD matches its KEM's strength.
_SUITES: Final[dict[str, Suite]] = {
    "x25519": Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM),
    "mlkem768-x25519": Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
}


def sha256(data: bytes | bytearray | memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def random_bytes(count: int) -> bytes:
    """Unpredictable bytes from the operating system."""
    return os.urandom(count)


def key_id(public: bytes) -> bytes:
    """The first 8 bytes of SHA-256 of a raw public key: finds a key, proves nothing."""
    return sha256(public)[:KEY_ID_BYTES]


class VerifyKey:
    """An Ed25519 public key."""

    __slots__ = ("_key", "key_id", "public_bytes")

    def __init__(self, public: bytes) -> None:
        """Takes 32 raw bytes.

        Raises:
            TrustError: not an Ed25519 public key.
        """
        try:
            self._key = ed25519.Ed25519PublicKey.from_public_bytes(public)
        except (ValueError, TypeError) as error:
            raise TrustError("not an Ed25519 public key of 32 bytes") from error
        self.public_bytes = bytes(public)
        self.key_id = key_id(self.public_bytes)

    def verify(self, signature: bytes, data: bytes) -> None:
        """Returns when the signature is this key's over `data`.

        Raises:
            EnvelopeError: (peer) it is not.
        """
        try:
            self._key.verify(signature, data)
        except (InvalidSignature, ValueError, TypeError) as error:
            raise EnvelopeError("message does not open", reason="signature") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifyKey) and other.public_bytes == self.public_bytes

    def __hash__(self) -> int:
        return hash(self.public_bytes)

    def __repr__(self) -> str:
        return f"VerifyKey({self.key_id.hex()})"


class SigningKey:
    """An Ed25519 private key. Its `repr` shows the key id only."""

    def __init__(self, seed: bytes) -> None:
        try:
            self._key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
        except (ValueError, TypeError) as error:
            raise TrustError("not an Ed25519 private key of 32 bytes") from error

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(random_bytes(SEED_BYTES))

    @classmethod
    def from_bytes(cls, seed: bytes) -> SigningKey:
        """The key of a 32-byte seed, always the same (RFC 8032): a simulation derives keys from its own.

        Raises:
            TrustError: not 32 bytes.
        """
        return cls(seed)

    def private_bytes(self) -> bytes:
        """The 32-byte seed."""
        return self._key.private_bytes_raw()

    @cached_property
    def public_bytes(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    @cached_property
    def key_id(self) -> bytes:
        return key_id(self.public_bytes)

    @property
    def verify_key(self) -> VerifyKey:
        return VerifyKey(self.public_bytes)

    def sign(self, data: bytes) -> bytes:
        """Returns the 64-byte signature."""
        return self._key.sign(data)

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id.hex()})"


class KemPublicKey:
    """A public key that content keys are wrapped to by HPKE."""

    __slots__ = ("_key", "algorithm", "key_id", "public_bytes")

    def __init__(self, algorithm: str, public: bytes) -> None:
        """Takes raw bytes: 32 for `x25519`, 1,216 (ML-KEM-768 then X25519) for `mlkem768-x25519`.

        Raises:
            TrustError: an unknown algorithm, or bytes that are not its public key.
        """
        self.algorithm = _checked_algorithm(algorithm)
        if len(public) != _PUBLIC_BYTES[algorithm]:
            raise TrustError(
                f"a public key of {algorithm} has {_PUBLIC_BYTES[algorithm]} bytes, not {len(public)}"
            )
        self._key: x25519.X25519PublicKey | MLKEM768X25519PublicKey
        try:
            # X25519PublicKey.from_public_bytes is this call, after 2 MiB of older API have been loaded to ask
            # whether the library was built with X25519: a device would hold them for ever.
            classic = binding.x25519.from_public_bytes(public[-32:])
            if algorithm == "x25519":
                self._key = classic
            else:
                lattice = mlkem.MLKEM768PublicKey.from_public_bytes(public[:_MLKEM_PUBLIC_BYTES])
                self._key = MLKEM768X25519PublicKey(lattice, classic)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise TrustError(f"not a public key of {algorithm}") from error
        self.public_bytes = bytes(public)
        self.key_id = key_id(self.public_bytes)

    def wrap(self, content_key: bytes, *, info: bytes) -> tuple[bytes, bytes]:
        """HPKE base mode, single shot: returns (encapsulated key, wrapped content key)."""
        try:
            sealed = _SUITES[self.algorithm].encrypt(content_key, self._key, info=info)
        except ValueError as error:
            raise TrustError("nothing can be sealed to this public key", key_id=self.key_id.hex()) from error
        length = _ENCAPSULATED_BYTES[self.algorithm]
        return sealed[:length], sealed[length:]

    def __repr__(self) -> str:
        return f"KemPublicKey({self.algorithm}, {self.key_id.hex()})"


class KemPrivateKey:
    """The private half. Its bytes are one 32-byte seed for either algorithm."""

    def __init__(self, algorithm: str, seed: bytes) -> None:
        self.algorithm = _checked_algorithm(algorithm)
        if len(seed) != SEED_BYTES:
            raise TrustError(f"a private key of {algorithm} has {SEED_BYTES} bytes, not {len(seed)}")
        self._seed = bytes(seed)
        self._key: x25519.X25519PrivateKey | MLKEM768X25519PrivateKey
        if algorithm == "x25519":
            self._key = x25519.X25519PrivateKey.from_private_bytes(seed)
        else:
            self._key = MLKEM768X25519PrivateKey(*_expand_hybrid(seed))

    @classmethod
    def generate(cls, algorithm: str = "x25519") -> KemPrivateKey:
        return cls(algorithm, random_bytes(SEED_BYTES))

    @classmethod
    def from_bytes(cls, algorithm: str, seed: bytes) -> KemPrivateKey:
        """The key of a seed, always the same.

        Raises:
            TrustError: an unknown algorithm, or not 32 bytes.
        """
        return cls(algorithm, seed)

    def private_bytes(self) -> bytes:
        """The 32-byte seed."""
        return self._seed

    @cached_property
    def public_key(self) -> KemPublicKey:
        if isinstance(self._key, x25519.X25519PrivateKey):
            return KemPublicKey(self.algorithm, self._key.public_key().public_bytes_raw())
        lattice, classic = _expand_hybrid(self._seed)
        public = lattice.public_key().public_bytes_raw() + classic.public_key().public_bytes_raw()
        return KemPublicKey(self.algorithm, public)

    @property
    def key_id(self) -> bytes:
        return self.public_key.key_id

    def unwrap(self, encapsulated: bytes, wrapped: bytes, *, info: bytes) -> bytes:
        """Opens what `KemPublicKey.wrap` made with the same `info`; returns the content key.

        Raises:
            EnvelopeError: (peer) it was not made for this key and `info`.
        """
        if len(encapsulated) != _ENCAPSULATED_BYTES[self.algorithm]:
            raise EnvelopeError("message does not open", reason="key")
        try:
            return _SUITES[self.algorithm].decrypt(encapsulated + wrapped, self._key, info=info)
        except (InvalidTag, ValueError) as error:
            raise EnvelopeError("message does not open", reason="key") from error

    def __repr__(self) -> str:
        return f"KemPrivateKey({self.algorithm}, {self.key_id.hex()})"


def _checked_algorithm(algorithm: str) -> KemAlgorithm:
    if algorithm not in KEM_ALGORITHMS:
        raise TrustError(f"no KEM algorithm {algorithm!r}", hint=f"one of {', '.join(KEM_ALGORITHMS)}")
    return algorithm


def _expand_hybrid(seed: bytes) -> tuple[mlkem.MLKEM768PrivateKey, x25519.X25519PrivateKey]:
    """X-Wing's key expansion: ML-KEM's (d, z), then the X25519 scalar."""
    expanded = hashlib.shake_256(seed).digest(_MLKEM_SEED_BYTES + 32)
    try:
        lattice = mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:_MLKEM_SEED_BYTES])
    except UnsupportedAlgorithm as error:
        raise TrustError("this build of cryptography has no ML-KEM-768") from error
    return lattice, x25519.X25519PrivateKey.from_private_bytes(expanded[_MLKEM_SEED_BYTES:])


class AgreementKey:
    """An X25519 private key that two parties agree on a secret with."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise TrustError(f"a private key of x25519 has {SEED_BYTES} bytes, not {len(seed)}")
        self._key = x25519.X25519PrivateKey.from_private_bytes(seed)

    @cached_property
    def public_bytes(self) -> bytes:
        """32 raw bytes."""
        return self._key.public_key().public_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """The secret that the owner of `public` agrees on too; derive keys from it with `hkdf`.

        Raises:
            TrustError: (peer) not a public key, or one of those that make every secret the same.
        """
        try:
            return self._key.exchange(binding.x25519.from_public_bytes(public))
        except ValueError as error:
            raise TrustError("not a public key of x25519") from error


def hkdf(secret: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 without salt: one key for each `info`."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


class Keystream:
    """AES-256 in counter mode from zero over zeros: bytes that only who has the key can tell from random ones.

    A key must make one stream only.
    """

    def __init__(self, key: bytes) -> None:
        # Loaded here: a device without secure aggregation need not hold it.
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def next(self, zeros: bytes | memoryview) -> bytes:
        """As many further bytes as `zeros` has, all of which must be zero."""
        return self._cipher.update(zeros)


class Aead:
    """A content key, used for one message: AES-256-GCM or ChaCha20-Poly1305, nonce 12 bytes, tag 16."""

    def __init__(self, algorithm: str, key: bytes) -> None:
        if len(key) != CONTENT_KEY_BYTES:
            raise EnvelopeError("message does not open", reason="key")
        if algorithm == "A256GCM":
            self._cipher: AESGCM | ChaCha20Poly1305 = AESGCM(key)
        elif algorithm == "C20P":
            self._cipher = ChaCha20Poly1305(key)
        else:
            raise EnvelopeError("message does not open", reason="algorithm")

    def seal_into(self, nonce: bytes, plaintext: bytes | memoryview, aad: bytes, out: memoryview) -> None:
        """Writes ciphertext and tag to `out`, whose length is that of `plaintext` plus 16."""
        self._cipher.encrypt_into(nonce, plaintext, aad, out)

    def open(self, nonce: bytes, ciphertext: memoryview, aad: bytes) -> bytes:
        """The plaintext; raises like `open_into`."""
        try:
            return self._cipher.decrypt(nonce, ciphertext, aad)
        except (InvalidTag, ValueError) as error:
            raise EnvelopeError("message does not open", reason="content") from error

    def open_into(self, nonce: bytes, ciphertext: memoryview, aad: bytes, out: memoryview) -> None:
        """Writes the plaintext to `out`, whose length is that of `ciphertext` minus 16.

        Raises:
            EnvelopeError: (peer) the ciphertext, nonce or `aad` is not what was sealed with this key.
        """
        try:
            self._cipher.decrypt_into(nonce, ciphertext, aad, out)
        except (InvalidTag, ValueError) as error:
            raise EnvelopeError("message does not open", reason="content") from error


def faster_content_algorithm(clock: Callable[[], float]) -> ContentAlgorithm:
    """The content algorithm that seals faster on this processor: AES where it has instructions for it.

    Both are equally strong and every receiver opens both, so speed alone decides; AES-256-GCM unless
    ChaCha20-Poly1305 is faster by a tenth, so that a tie does not change from start to start. Takes about 1 ms,
    20 ms on a processor without AES instructions.

    Args:
        clock: seconds that only grow, such as `time.perf_counter`.
    """
    plaintext = memoryview(bytes(_TRIAL_BYTES))
    sealed = memoryview(bytearray(_TRIAL_BYTES + TAG_BYTES))
    aeads = {name: Aead(name, bytes(CONTENT_KEY_BYTES)) for name in CONTENT_ALGORITHMS}
    taken: dict[str, list[float]] = {name: [] for name in CONTENT_ALGORITHMS}
    for _ in range(_TRIALS):
        for name, aead in aeads.items():
            start = clock()
            aead.seal_into(bytes(NONCE_BYTES), plaintext, b"", sealed)
            taken[name].append(clock() - start)
    # The shortest time is the one that nothing else disturbed.
    return "C20P" if 1.1 * min(taken["C20P"]) < min(taken["A256GCM"]) else "A256GCM"


# --- private key files ------------------------------------------------------------------------------------


def write_private(path: Path, data: bytes) -> None:
    """Writes a secret that only its owner can read: all of it or nothing, and on the disk when this returns.

    Raises:
        StorageError: the folder is missing, full or not writable.
    """
    partial = path.with_name(f".{path.name}.{random_bytes(4).hex()}.part")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(f"cannot write the key file {path}: {error.strerror}", path=str(path)) from error


def read_private(path: Path) -> bytes:
    """Reads what `write_private` wrote.

    Raises:
        StorageError: the file is missing or cannot be read.
        ConfigurationError: (operator) its group or others may read or write it, it is not a plain file, or
            too long.
    """
    try:
        # Without O_NONBLOCK a pipe that lies in a key's place would be waited on for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigurationError(
                    f"the key file {path} is not a plain file",
                    hint="restore it from its backup",
                    path=str(path),
                )
            if status.st_mode & 0o077:
                raise ConfigurationError(
                    f"the key file {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o})",
                    hint=f"chmod 600 {path}",
                    path=str(path),
                    mode=stat.S_IMODE(status.st_mode),
                )
            data = file.read(_MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise StorageError(f"cannot read the key file {path}: {error.strerror}", path=str(path)) from error
    if len(data) > _MAX_KEY_FILE_BYTES:
        raise ConfigurationError(
            f"the key file {path} is too long to be a key", hint="restore it from its backup", path=str(path)
        )
    return data


# --- TLS keys and certificates ----------------------------------------------------------------------------
# X.509 and PEM code costs 3 MiB and is imported where it is used: a device needs it once in days.


def generate_tls_key() -> bytes:
    """A fresh Ed25519 TLS key as PKCS#8 PEM."""
    return tls_key_from_seed(random_bytes(SEED_BYTES))


def tls_key_from_seed(seed: bytes) -> bytes:
    """The TLS key of a 32-byte seed as PKCS#8 PEM, always the same."""
    from cryptography.hazmat.primitives import serialization

    try:
        key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    except (ValueError, TypeError) as error:
        raise TrustError("not an Ed25519 private key of 32 bytes") from error
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_csr(key_pem: bytes, common_name: str) -> bytes:
    """A PKCS#10 request for a certificate of `common_name`, signed by the key; PEM.

    Raises:
        TrustError: not an Ed25519 key in PEM, or a name that no certificate can carry.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.x509.oid import NameOID

    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TrustError(
            "no certificate can be requested with this key and name", name=common_name
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise TrustError("the TLS key is not an Ed25519 key")
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, None)
    return request.public_bytes(serialization.Encoding.PEM)


def certificate_fingerprint(pem: bytes) -> bytes:
    """SHA-256 of the certificate in DER (the first one of a chain).

    Raises:
        TrustError: not a certificate.
    """
    from cryptography.hazmat.primitives import serialization

    return sha256(_certificate(pem).public_bytes(serialization.Encoding.DER))


def certificate_fingerprints(pem: bytes) -> frozenset[bytes]:
    """SHA-256 of every certificate of a bundle, in DER.

    Raises:
        TrustError: no certificate, or not only certificates.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise TrustError("not certificates in PEM") from error
    return frozenset(sha256(each.public_bytes(serialization.Encoding.DER)) for each in found)


def certificate_not_after(pem: bytes) -> float:
    """When the certificate expires, in seconds since 1970.

    Raises:
        TrustError: not a certificate.
    """
    return certificate_validity(pem)[1]


def certificate_validity(pem: bytes) -> tuple[float, float]:
    """From when until when the certificate is valid, in seconds since 1970.

    Raises:
        TrustError: not a certificate.
    """
    found = _certificate(pem)
    return (
        found.not_valid_before_utc.astimezone(UTC).timestamp(),
        found.not_valid_after_utc.astimezone(UTC).timestamp(),
    )


def _certificate(pem: bytes) -> x509.Certificate:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise TrustError("not a certificate in PEM") from error
