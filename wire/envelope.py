"""Sealing and opening: the bytes that cross the broker, which is trusted with nothing.

    message    = length(4, big-endian) || head || ciphertext
    head       = COSE_Sign1(Ed25519) of
      sealed     [header, COSE_Encrypt, [plaintext bytes, record bytes, padded], record hashes, extensions]
      signed     [header, body, extensions], and no ciphertext
    ciphertext = AEAD records of at most `RECORD_BYTES` of plaintext each; nonce = IV xor index

Laws of the file: pure (randomness aside); caps before parsing; canonical re-encoding equals the input; the
signature is checked before anything that it covers is believed; the header is bound into the HPKE info and
every record's AEAD data; every failure to open is one `EnvelopeError` whose `reason` is for our logs only.
Sources: `wire/cose.py`, RFC 9180, the STREAM construction (Hoang et al. 2015), docs/protocol.md, clause 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from wire.cbor import encode_canonical, encode_joined
from wire.cose import (
    Encrypt,
    Recipient,
    RecordNames,
    checked_extensions,
    failed,
    read_content,
    read_extensions,
    read_sign1,
    sign1,
    sign1_length,
)
from wire.errors import MessageError
from wire.header import ALL_DEVICES, Header, check_header, header_bytes, header_from_map, header_to_map
from wire.primitives import (
    CONTENT_ALGORITHMS,
    CONTENT_KEY_BYTES,
    NONCE_BYTES,
    Aead,
    KemPrivateKey,
    KemPublicKey,
    SigningKey,
    VerifyKey,
    random_bytes,
    sha256,
)
from wire.records import (
    MAX_RECORD_BYTES,
    MIN_RECORD_BYTES,
    RECORD_BYTES,
    Records,
    padding_to_class,
    unpadded_length,
)
from wire.room import room

MAX_MESSAGE_BYTES: Final = 272 * 1024 * 1024
CLOCK_SKEW_SECONDS: Final = 60.0
BROADCAST_TYPES: Final = frozenset({"rd", "md"})
"""Types downward that are for all devices; every other message downward names the one device it is for."""

_LENGTH_BYTES: Final = 4
_HASH_BYTES: Final = 32
# The most that a sealed head holds besides record hashes: header, hybrid key, signature, eight extensions.
_SEALED_HEAD_BYTES: Final = 16_384


@dataclass(frozen=True, slots=True)
class Signer:
    """Whose key it is: a device's id, or empty for the cloud."""

    device: str
    key: VerifyKey


@dataclass(frozen=True, slots=True)
class Expect:
    """What the receiver is ready to open.

    Attributes:
        type: one type, or the set of types that the topic may carry.
        device: upward: the device that the topic names (None: whoever signed); downward: this device's own
            id, which a message must name unless its type is one of `BROADCAST_TYPES` (those must be for `*`).
        is_padded: a sealed message must be padded to its size class (5.6): whatever else a device's is refused.
    """

    direction: str
    tenant: str
    fleet: str
    type: str | frozenset[str]
    device: str | None = None
    is_padded: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A message that opened: what, by whom (`key_id` of the signer), and its ignorable extensions."""

    header: Header
    body: bytes
    key_id: bytes
    extensions: Mapping[int, bytes]


def seal(
    header: Header,
    body: bytes,
    *,
    signer: SigningKey,
    recipient: KemPublicKey,
    content_algorithm: str = "A256GCM",
    pad: bool = False,
    extensions: Mapping[int, bytes] | None = None,
    record_bytes: int = RECORD_BYTES,
) -> bytes:
    """Encrypts `body` for `recipient` and signs the result.

    Args:
        pad: grow the plaintext to its size class (`records.size_class`), so that its length says little.
        extensions: at most 8 numbered values of at most 1,024 bytes. A receiver that does not know a number
            above 0 refuses the message; one below 0 it ignores.

    Raises:
        MessageError: (us) a header, extension or size that no receiver would accept.
    """
    bound = header_bytes(check_header(header))
    if (
        content_algorithm not in CONTENT_ALGORITHMS
        or not MIN_RECORD_BYTES <= record_bytes <= MAX_RECORD_BYTES
    ):
        raise MessageError("no such content algorithm or record size", algorithm=content_algorithm)
    if len(body) > MAX_MESSAGE_BYTES:
        raise MessageError("body is too long to seal", size_bytes=len(body), limit_bytes=MAX_MESSAGE_BYTES)
    padding = padding_to_class(len(body)) if pad else b""
    content_key, iv = random_bytes(CONTENT_KEY_BYTES), random_bytes(NONCE_BYTES)
    to = Recipient.of(recipient.algorithm, recipient.key_id)
    encapsulated, wrapped = recipient.wrap(content_key, info=to.kdf_info(content_algorithm, bound))
    encrypt = Encrypt(content_algorithm, iv, to, encapsulated, wrapped)
    records = Records(len(body) + len(padding), record_bytes)
    front = [
        bound,
        encode_canonical(encrypt.to_cbor()),
        encode_canonical([records.plaintext_bytes, record_bytes, pad]),
    ]
    back = encode_canonical(checked_extensions(extensions))
    payload_bytes = len(encode_joined([*front, encode_canonical(bytes(records.count * _HASH_BYTES)), back]))
    # The head's length does not depend on the hashes, so the records go where they stay: touching a fresh
    # megabyte once more costs a third of the time that hashing it takes.
    head_bytes = _LENGTH_BYTES + sign1_length(payload_bytes, signer)
    message = room(head_bytes + records.ciphertext_bytes)
    with message.getbuffer() as whole:
        pieces = (records.plaintext_piece(index, memoryview(body), padding) for index in range(records.count))
        aead = Aead(content_algorithm, content_key)
        hashes = _seal_records(whole[head_bytes:], pieces, records, aead, RecordNames(encrypt, bound))
    payload = encode_joined([*front, encode_canonical(hashes), back])
    message.write(_framed(sign1(payload, signer)))
    return message.getvalue()


def _seal_records(
    ciphertext: memoryview,
    pieces: Iterable[bytes | memoryview],
    records: Records,
    aead: Aead,
    names: RecordNames,
) -> bytes:
    """Fills `ciphertext`; returns the hashes of its records, one after the other."""
    hashes = []
    last = records.count - 1
    for index, piece in enumerate(pieces):
        record = ciphertext[records.ciphertext_slice(index)]
        aead.seal_into(names.nonce(index), piece, names.aad(index, last=index == last), record)
        hashes.append(sha256(record))
    return b"".join(hashes)


def sign(
    header: Header, body: bytes, *, signer: SigningKey, extensions: Mapping[int, bytes] | None = None
) -> bytes:
    """Signs `body`, which stays readable.

    Raises:
        MessageError: (us) a header or extension that no receiver would accept.
    """
    content = [header_to_map(check_header(header)), body, checked_extensions(extensions)]
    return _framed(sign1(encode_canonical(content), signer))


@dataclass(frozen=True, slots=True)
class Opening:
    """A verified head of a sealed message, whose records open one by one, in any order, as they arrive."""

    header: Header
    key_id: bytes
    extensions: Mapping[int, bytes]
    records: Records
    padded: bool
    _aead: Aead
    _names: RecordNames
    _hashes: bytes

    def open_record_into(self, index: int, ciphertext: memoryview, out: memoryview) -> None:
        """Opens record `index` into `out`, which is as long as `records.plaintext_slice(index)`.

        The plaintext of a padded message ends in padding, which only `open_sealed` takes off.

        Raises:
            EnvelopeError: (peer) not the bytes that the head vouches for.
        """
        if sha256(ciphertext) != self._hashes[index * _HASH_BYTES : (index + 1) * _HASH_BYTES]:
            raise failed("digest")
        aad = self._names.aad(index, last=self.records.is_last(index))
        self._aead.open_into(self._names.nonce(index), ciphertext, aad, out)


def open_head(
    head: bytes,
    *,
    signers: Mapping[bytes, Signer],
    recipients: Mapping[bytes, KemPrivateKey],
    expect: Expect,
    now: float,
    limit_bytes: int,
    skew_seconds: float = CLOCK_SKEW_SECONDS,
) -> Opening:
    """Verifies the head of a sealed message (without the length in front) and unwraps its content key.

    Raises:
        EnvelopeError: (peer) as `open_sealed`.
    """
    if len(head) > _SEALED_HEAD_BYTES + limit_bytes // MIN_RECORD_BYTES * _HASH_BYTES:
        raise failed("size")
    key_id, signer, content = _verified(head, signers)
    if len(content) != 5:
        raise failed("structure")
    plain_header, plain_encrypt, sizes, hashes, plain_extensions = content
    header = _accepted_header(plain_header, signer, expect, now - skew_seconds)
    extensions = read_extensions(plain_extensions)
    records, padded = _read_sizes(sizes, limit_bytes)
    if expect.is_padded and not padded:
        raise failed("padding")
    if type(hashes) is not bytes or len(hashes) != records.count * _HASH_BYTES:
        raise failed("structure")
    encrypt = Encrypt.from_cbor(plain_encrypt)
    private = recipients.get(encrypt.recipient.key_id)
    if private is None:
        raise failed("recipient")
    if private.algorithm != encrypt.recipient.algorithm:
        raise failed("algorithm")
    bound = header_bytes(header)
    info = encrypt.recipient.kdf_info(encrypt.algorithm, bound)
    aead = Aead(encrypt.algorithm, private.unwrap(encrypt.encapsulated, encrypt.wrapped, info=info))
    return Opening(header, key_id, extensions, records, padded, aead, RecordNames(encrypt, bound), hashes)


def open_sealed(
    message: bytes,
    *,
    signers: Mapping[bytes, Signer],
    recipients: Mapping[bytes, KemPrivateKey],
    expect: Expect,
    now: float,
    limit_bytes: int,
    skew_seconds: float = CLOCK_SKEW_SECONDS,
) -> Opened:
    """Verifies and decrypts a whole sealed message of at most `limit_bytes`.

    Raises:
        EnvelopeError: (peer) anything whatever is wrong with it; `reason` names what.
    """
    head, ciphertext = _split_frame(message, limit_bytes)
    opening = open_head(
        head,
        signers=signers,
        recipients=recipients,
        expect=expect,
        now=now,
        limit_bytes=limit_bytes,
        skew_seconds=skew_seconds,
    )
    records = opening.records
    if len(ciphertext) != records.ciphertext_bytes:
        raise failed("size")
    plaintext = room(records.plaintext_bytes)
    with plaintext.getbuffer() as whole:
        for index in range(records.count):
            record = ciphertext[records.ciphertext_slice(index)]
            opening.open_record_into(index, record, whole[records.plaintext_slice(index)])
        body_bytes = unpadded_length(whole) if opening.padded else len(whole)
    plaintext.truncate(body_bytes)
    return Opened(opening.header, plaintext.getvalue(), opening.key_id, opening.extensions)


def open_signed(
    message: bytes,
    *,
    signers: Mapping[bytes, Signer],
    expect: Expect,
    now: float,
    limit_bytes: int,
    skew_seconds: float = CLOCK_SKEW_SECONDS,
) -> Opened:
    """Verifies a signed, clear message of at most `limit_bytes`.

    Raises:
        EnvelopeError: (peer) anything whatever is wrong with it; `reason` names what.
    """
    head, rest = _split_frame(message, limit_bytes)
    if len(rest) != 0:
        raise failed("size")
    key_id, signer, content = _verified(head, signers)
    if len(content) != 3 or type(content[1]) is not bytes:
        raise failed("structure")
    header = _accepted_header(content[0], signer, expect, now - skew_seconds)
    return Opened(header, content[1], key_id, read_extensions(content[2]))


def peek(message: bytes) -> Header:
    """Reads the header WITHOUT verifying anything: to log and to find a queue, never to decide.

    Raises:
        EnvelopeError: (peer) not even the shape of a message.
    """
    head, _ = _split_frame(message, MAX_MESSAGE_BYTES)
    content = read_content(read_sign1(head, limit_bytes=len(head)).payload)
    return _read_header(content[0])


def _framed(head: bytes) -> bytes:
    return len(head).to_bytes(_LENGTH_BYTES, "big") + head


def _split_frame(message: bytes, limit_bytes: int) -> tuple[bytes, memoryview]:
    """Returns head and ciphertext."""
    if len(message) > limit_bytes or len(message) < _LENGTH_BYTES:
        raise failed("size")
    end = _LENGTH_BYTES + int.from_bytes(message[:_LENGTH_BYTES], "big")
    if end > len(message):
        raise failed("size")
    return bytes(message[_LENGTH_BYTES:end]), memoryview(message)[end:]


def _verified(head: bytes, signers: Mapping[bytes, Signer]) -> tuple[bytes, Signer, list[Any]]:
    """Checks the signature, then parses what it covers; returns (key id, signer, content)."""
    outer = read_sign1(head, limit_bytes=len(head))
    signer = signers.get(outer.key_id)
    if signer is None:
        raise failed("signer")
    signer.key.verify(outer.signature, outer.signed_bytes())
    return outer.key_id, signer, read_content(outer.payload)


def _read_header(plain: object) -> Header:
    try:
        return header_from_map(plain)
    except MessageError as error:
        raise failed("header") from error


def _accepted_header(plain: object, signer: Signer, expect: Expect, earliest_expiry: float) -> Header:
    """The header, if it is one, comes from the signer, is for us and has not expired."""
    header = _read_header(plain)
    types = frozenset((expect.type,)) if isinstance(expect.type, str) else expect.type
    if header.direction != expect.direction:
        raise failed("direction")
    if header.tenant != expect.tenant or header.fleet != expect.fleet:
        raise failed("fleet")
    if header.type not in types:
        raise failed("type")
    if signer.device != (header.device if header.direction == "up" else ""):
        raise failed("sender")
    if header.device != _expected_device(header, expect):
        raise failed("device")
    if header.expiry and header.expiry < earliest_expiry:
        raise failed("expired")
    return header


def _expected_device(header: Header, expect: Expect) -> str:
    if header.direction == "up":
        return header.device if expect.device is None else expect.device
    if header.type in BROADCAST_TYPES:
        return ALL_DEVICES
    return expect.device or ""


def _read_sizes(sizes: object, limit_bytes: int) -> tuple[Records, bool]:
    if type(sizes) is not list or len(sizes) != 3:
        raise failed("structure")
    plaintext_bytes, record_bytes, padded = sizes
    if type(plaintext_bytes) is not int or type(record_bytes) is not int or type(padded) is not bool:
        raise failed("structure")
    if not 0 <= plaintext_bytes <= limit_bytes or not MIN_RECORD_BYTES <= record_bytes <= MAX_RECORD_BYTES:
        raise failed("size")
    return Records(plaintext_bytes, record_bytes), padded
