"""The COSE structures of a message: built and taken apart, strictly.

COSE_Sign1 (RFC 9052 §4.2, tag 18, Ed25519) carries the content; COSE_Encrypt (§5.1, ciphertext detached) with
one HPKE recipient (draft-ietf-cose-hpke, key encryption) says how the ciphertext was made. Laws of the file:
canonical CBOR only, closed key sets, one recipient, empty unprotected headers but for IV and encapsulated
key; what does not fit is an `EnvelopeError` with a `reason`. Source: docs/protocol.md, clause 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

from wire.cbor import (
    byte_string_head,
    decode_canonical,
    decode_tagged,
    encode_canonical,
    encode_tagged,
    unsigned_bytes,
)
from wire.errors import EnvelopeError, MessageError
from wire.primitives import CONTENT_KEY_BYTES, NONCE_BYTES, SIGNATURE_BYTES, TAG_BYTES, SigningKey

CONTENT_TYPE: Final = "application/shoal+cose"
MAX_EXTENSIONS: Final = 8
MAX_EXTENSION_BYTES: Final = 1024

_SIGN1_TAG: Final = 18
_ALG, _CONTENT, _KID, _IV, _EK = 1, 3, 4, 5, -4
_EDDSA: Final = -8
_CONTENT_ALGS: Final[dict[str, int]] = {"A256GCM": 3, "C20P": 24}
# 49 is HPKE-3-KE; the hybrid has no number yet, so it takes one of COSE's private-use range.
_KEM_ALGS: Final[dict[str, int]] = {"x25519": 49, "mlkem768-x25519": -70001}
_CONTENT_NAMES: Final = {number: name for name, number in _CONTENT_ALGS.items()}
_KEM_NAMES: Final = {number: name for name, number in _KEM_ALGS.items()}
_MAX_PROTECTED_BYTES: Final = 64
_SIGN1_KEYS: Final = frozenset((_ALG, _CONTENT, _KID))
_CONTENT_KEYS: Final = frozenset((_ALG,))
_RECIPIENT_KEYS: Final = frozenset((_ALG, _KID))
_FALSE: Final = b"\xf4"
_TRUE: Final = b"\xf5"


def failed(reason: str) -> EnvelopeError:
    """The one error of opening; `reason` is for our own logs, never for the peer."""
    return EnvelopeError("message does not open", reason=reason)


@dataclass(frozen=True, slots=True)
class Sign1:
    """A COSE_Sign1 whose shape is right; nothing in it is verified."""

    protected: bytes
    key_id: bytes
    payload: bytes
    signature: bytes

    def signed_bytes(self) -> bytes:
        return _to_be_signed(self.protected, self.payload)


def sign1(payload: bytes, signer: SigningKey) -> bytes:
    """COSE_Sign1 over `payload`."""
    protected = _protected_by(signer.key_id)
    signature = signer.sign(_to_be_signed(protected, payload))
    return encode_tagged(_SIGN1_TAG, [protected, {}, payload, signature])


def sign1_length(payload_bytes: int, signer: SigningKey) -> int:
    """How long `sign1` of any payload of `payload_bytes` is."""
    return _empty_sign1_bytes(signer.key_id) - 1 + len(byte_string_head(payload_bytes)) + payload_bytes


@lru_cache(maxsize=256)
def _empty_sign1_bytes(key_id: bytes) -> int:
    return len(encode_tagged(_SIGN1_TAG, [_protected_by(key_id), {}, b"", bytes(SIGNATURE_BYTES)]))


@lru_cache(maxsize=256)
def _protected_by(key_id: bytes) -> bytes:
    return encode_canonical({_ALG: _EDDSA, _CONTENT: CONTENT_TYPE, _KID: key_id})


def read_sign1(head: bytes, *, limit_bytes: int) -> Sign1:
    """Takes a COSE_Sign1 apart without verifying it."""
    try:
        outer = decode_tagged(head, _SIGN1_TAG, limit_bytes=limit_bytes)
    except MessageError as error:
        raise failed("cbor") from error
    if type(outer) is not list or len(outer) != 4:
        raise failed("structure")
    protected, unprotected, payload, signature = outer
    if (
        type(unprotected) is not dict
        or unprotected
        or type(payload) is not bytes
        or type(signature) is not bytes
    ):
        raise failed("structure")
    if len(signature) != SIGNATURE_BYTES:
        raise failed("signature")
    values = _protected_map(protected, _SIGN1_KEYS)
    if values[_ALG] != _EDDSA or values[_CONTENT] != CONTENT_TYPE:
        raise failed("algorithm")
    if type(values[_KID]) is not bytes:
        raise failed("structure")
    return Sign1(protected, values[_KID], payload, signature)


def read_content(payload: bytes) -> list[Any]:
    """What a COSE_Sign1 carries: a list that is not empty."""
    try:
        content = decode_canonical(payload, limit_bytes=len(payload))
    except MessageError as error:
        raise failed("cbor") from error
    if type(content) is not list or not content:
        raise failed("structure")
    return content


@dataclass(frozen=True, slots=True)
class Recipient:
    """Who can unwrap the content key: KEM algorithm, key id, and the protected header that says so."""

    algorithm: str
    key_id: bytes
    protected: bytes

    @classmethod
    @lru_cache(maxsize=256)  # who seals much seals to few
    def of(cls, algorithm: str, key_id: bytes) -> Recipient:
        return cls(algorithm, key_id, encode_canonical({_ALG: _KEM_ALGS[algorithm], _KID: key_id}))

    def kdf_info(self, content_algorithm: str, header: bytes) -> bytes:
        """HPKE's `info`: Recipient_structure with the message's header bytes as the extra info."""
        return encode_canonical(
            ["HPKE Recipient", _CONTENT_ALGS[content_algorithm], self.protected, header],
        )


@dataclass(frozen=True, slots=True)
class Encrypt:
    """A COSE_Encrypt with detached ciphertext and one recipient."""

    algorithm: str
    iv: bytes
    recipient: Recipient
    encapsulated: bytes
    wrapped: bytes

    def to_cbor(self) -> list[Any]:
        recipient = [self.recipient.protected, {_EK: self.encapsulated}, self.wrapped]
        return [content_protected(self.algorithm), {_IV: self.iv}, None, [recipient]]

    @classmethod
    def from_cbor(cls, plain: object) -> Encrypt:
        """Reads what `to_cbor` made; anything else is an `EnvelopeError`."""
        match plain:
            case [bytes(protected), dict(clear), None, [[bytes(to), dict(sent), bytes(wrapped)]]]:
                iv, encapsulated = clear.get(_IV), sent.get(_EK)
            case _:
                raise failed("structure")
        if (
            set(clear) != {_IV}
            or set(sent) != {_EK}
            or type(iv) is not bytes
            or type(encapsulated) is not bytes
        ):
            raise failed("structure")
        if len(iv) != NONCE_BYTES or len(wrapped) != CONTENT_KEY_BYTES + TAG_BYTES:
            raise failed("structure")
        content = _known(_CONTENT_NAMES, _protected_map(protected, _CONTENT_KEYS)[_ALG])
        values = _protected_map(to, _RECIPIENT_KEYS)
        if type(values[_KID]) is not bytes:
            raise failed("structure")
        recipient = Recipient(_known(_KEM_NAMES, values[_ALG]), values[_KID], to)
        return cls(content, iv, recipient, encapsulated, wrapped)


@lru_cache(maxsize=len(_CONTENT_ALGS))
def content_protected(algorithm: str) -> bytes:
    """The protected header of the content layer."""
    return encode_canonical({_ALG: _CONTENT_ALGS[algorithm]})


class RecordNames:
    """Nonce and additional data of every record of one message; built once, because encoding them anew for each
    record takes as long as hashing a tenth of it."""

    __slots__ = ("_external", "_front", "_iv")

    def __init__(self, encrypt: Encrypt, header: bytes) -> None:
        self._iv = int.from_bytes(encrypt.iv, "big")
        self._front = _aad_front(encrypt.algorithm)
        # Cut before what differs from record to record: its place, and whether it is the last.
        self._external = encode_canonical([header, 0, False])[:-2]

    def nonce(self, index: int) -> bytes:
        """Distinct for every record of one IV."""
        return (self._iv ^ index).to_bytes(NONCE_BYTES, "big")

    def aad(self, index: int, *, last: bool) -> bytes:
        """Enc_structure; its external data are the header, the record's place and whether it is the last."""
        external = self._external + unsigned_bytes(index) + (_TRUE if last else _FALSE)
        return self._front + byte_string_head(len(external)) + external


@lru_cache(maxsize=len(_CONTENT_ALGS))
def _aad_front(algorithm: str) -> bytes:
    """Enc_structure before its external data, an empty byte string, which is cut off."""
    return encode_canonical(["Encrypt", content_protected(algorithm), b""])[:-1]


def checked_extensions(extensions: Mapping[int, bytes] | None) -> dict[int, bytes]:
    """Extensions as they may be sent.

    Raises:
        MessageError: (us) more or larger than a receiver accepts.
    """
    plain = dict(extensions or {})
    try:
        _check_extensions(plain)
    except EnvelopeError as error:
        raise MessageError("extensions that no receiver would accept") from error
    return plain


def read_extensions(plain: object) -> dict[int, bytes]:
    """Extensions as received: a number above 0 is critical, and this version knows none of those."""
    if type(plain) is not dict:
        raise failed("structure")
    _check_extensions(plain)
    if any(number > 0 for number in plain):
        raise failed("extension")
    return plain


def _check_extensions(plain: dict[Any, Any]) -> None:
    if len(plain) > MAX_EXTENSIONS:
        raise failed("extension")
    for number, value in plain.items():
        if type(number) is not int or not 0 < abs(number) < 2**16:
            raise failed("extension")
        if type(value) is not bytes or len(value) > MAX_EXTENSION_BYTES:
            raise failed("extension")


def _to_be_signed(protected: bytes, payload: bytes) -> bytes:
    return encode_canonical(["Signature1", protected, b"", payload])


def _protected_map(protected: object, keys: frozenset[int]) -> Mapping[int, Any]:
    """A COSE protected header: a byte string that holds a map with exactly these keys."""
    if type(protected) is not bytes:
        raise failed("structure")
    values = _read_protected(protected)
    if values.keys() != keys:
        raise failed("structure")
    return values


@lru_cache(maxsize=256)
def _read_protected(protected: bytes) -> Mapping[int, Any]:
    """Kept, because every message of a sender has the same three; what fails is not kept."""
    try:
        values = decode_canonical(protected, limit_bytes=_MAX_PROTECTED_BYTES)
    except MessageError as error:
        raise failed("cbor") from error
    if type(values) is not dict:
        raise failed("structure")
    return MappingProxyType(values)


def _known(names: dict[int, str], number: object) -> str:
    name = names.get(number) if type(number) is int else None
    if name is None:
        raise failed("algorithm")
    return name
