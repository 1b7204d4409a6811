"""Hostile envelopes by seed, one half of them with a valid signature of an enrolled key.

Every message that comes out of here must be refused: what is damaged, misdirected, or signed by a device that does not
keep to docs/protocol.md. A device may well sign another message than the one that was damaged, as long as it is a good
one; `is_good` knows those, and they are not taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import cbor2

from tests.fuzz.mutation import NASTY, mutated_bytes, mutated_value, respelled
from tests.wire.parties import (
    CLOUD_KEY,
    DEVICE_KEY,
    KEMS,
    NOW,
    OTHER_KEY,
    SIGNERS,
    STRANGER_KEY,
    down_header,
    open_down,
    open_up,
    up_header,
)
from wire.cbor import decode_canonical, encode_canonical, encode_tagged
from wire.cose import read_sign1
from wire.envelope import Opened, seal, sign
from wire.header import header_bytes, header_to_map
from wire.primitives import Aead, KemPrivateKey, SigningKey, random_bytes, sha256
from wire.records import padding_to_class

LIMIT_BYTES = 2**20
EXTENSIONS = ({}, {}, {-5: b"a hint"})


@dataclass(frozen=True, slots=True)
class Hostile:
    """A message that must not open.

    Attributes:
        kind: which of the generators below made it.
        is_signed: whether the signature on it is a valid one of an enrolled key.
        goes_up: who receives it: the cloud, or `watch-1`.
    """

    kind: str
    is_signed: bool
    goes_up: bool
    message: bytes


@dataclass(frozen=True, slots=True)
class Base:
    """A good message, taken apart."""

    goes_up: bool
    message: bytes
    content: list[Any]
    ciphertext: bytes
    key: SigningKey


def opened(hostile: Hostile) -> Opened:
    """Opens as its receiver does; every enrolled key is known to it, so that a key alone refuses nothing."""
    if hostile.goes_up:
        return open_up(hostile.message, signers=SIGNERS, limit_bytes=LIMIT_BYTES)
    return open_down(hostile.message, signers=SIGNERS, limit_bytes=LIMIT_BYTES)


class Generator:
    """An endless source of hostile messages; the same seed makes the same choices."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._bases = [*_sealed_bases(), *_signed_bases()]
        self._sealed = [base for base in self._bases if base.ciphertext]

    def next(self) -> Hostile:
        makers = _SIGNED if self._random.random() < 0.5 else _UNSIGNED
        while True:
            maker = self._random.choice(makers)
            base = self._random.choice(self._sealed if maker in _OF_SEALED else self._bases)
            message = maker(self._random, base)
            if message is not None and message != base.message:
                return Hostile(maker.__name__.strip("_"), makers is _SIGNED, base.goes_up, message)


def _sealed_bases() -> list[Base]:
    bases = []
    for kem in KEMS.values():
        for algorithm in ("A256GCM", "C20P"):
            for size, pad in ((0, False), (300, True), (2500, False), (3000, True)):
                message = seal(
                    up_header(),
                    bytes(range(256)) * 12 if size == 3000 else b"\x01" * size,
                    signer=DEVICE_KEY,
                    recipient=kem.public_key,
                    content_algorithm=algorithm,
                    pad=pad,
                    record_bytes=1024,
                    extensions=EXTENSIONS[size % len(EXTENSIONS)],
                )
                bases.append(taken_apart(message, DEVICE_KEY, goes_up=True))
    return bases


def _signed_bases() -> list[Base]:
    headers = (down_header(), down_header(type="cm"), down_header(type="md", device="*"))
    return [
        taken_apart(
            sign(header, b"a body", signer=CLOUD_KEY, extensions=extensions), CLOUD_KEY, goes_up=False
        )
        for header, extensions in zip(headers, EXTENSIONS, strict=True)
    ]


def taken_apart(message: bytes, key: SigningKey, *, goes_up: bool) -> Base:
    """A good message of `key`, which must open."""
    end = 4 + int.from_bytes(message[:4], "big")
    content = decode_canonical(
        read_sign1(message[4:end], limit_bytes=LIMIT_BYTES).payload, limit_bytes=LIMIT_BYTES
    )
    base = Base(goes_up, message, content, message[end:], key)
    opened(Hostile("good", True, goes_up, message))
    return base


def framed(head: bytes, ciphertext: bytes) -> bytes:
    return len(head).to_bytes(4, "big") + head + ciphertext


def signed_head(payload: bytes, key: SigningKey, **changes: Any) -> bytes:
    """A COSE_Sign1 with a valid signature over its own bytes, whatever else is odd about it."""
    protected = changes.get(
        "protected", encode_canonical({1: -8, 3: "application/shoal+cose", 4: key.key_id})
    )
    signature = key.sign(encode_canonical(["Signature1", protected, b"", payload]))
    parts = [protected, changes.get("unprotected", {}), payload, signature, *changes.get("more", ())]
    return encode_tagged(changes.get("tag", 18), parts)


# --- with a valid signature ---


def _structure(random: Random, base: Base) -> bytes | None:
    """One to three places of the content are others."""
    content = base.content
    for _ in range(random.choice((1, 1, 2, 3))):
        content = mutated_value(random, content)
    return _signed_content(base, content)


def _element(random: Random, base: Base) -> bytes | None:
    """One element of the content is something else altogether."""
    content = list(base.content)
    content[random.randrange(len(content))] = random.choice(NASTY)
    return _signed_content(base, content)


def _inner_protected(random: Random, base: Base) -> bytes | None:
    """The protected header of content or recipient is another map."""
    protected, clear, nothing, [[to, sent, wrapped]] = base.content[1]
    if random.random() < 0.1:
        to = encode_canonical(
            {1: random.choice((49, -70001, 50)), 4: random.choice(list(KEMS.values())).key_id}
        )
    elif random.random() < 0.5:
        protected = _odd_protected(random, decode_canonical(protected, limit_bytes=64))
    else:
        to = _odd_protected(random, decode_canonical(to, limit_bytes=64))
    return _signed_content(
        base, [base.content[0], [protected, clear, nothing, [[to, sent, wrapped]]], *base.content[2:]]
    )


def _odd_protected(random: Random, values: dict[int, Any]) -> bytes:
    if random.random() < 0.3:
        return respelled(random, values, 0.5)
    return _encoded(mutated_value(random, values)) or b""


def _header(random: Random, base: Base) -> bytes | None:
    """One field of the header is another."""
    if random.random() < 0.3:
        return _signed_content(base, [base.content[0] | random.choice(_ODD_FIELDS), *base.content[1:]])
    return _signed_content(base, [mutated_value(random, base.content[0]), *base.content[1:]])


_ODD_FIELDS: tuple[dict[int, Any], ...] = (
    {1: 2}, {3: "up", 6: "*"}, {3: "down", 6: "*"}, {14: 1}, {14: 5, 15: 5}, {15: 1}, {14: 0}, {9: ""}, {6: "watch-2"},
    {99: 0},
)  # fmt: skip


def _spelling(random: Random, base: Base) -> bytes | None:
    """The content is a good one, and its spelling is not."""
    payload = respelled(random, base.content)
    if payload == encode_canonical(base.content):
        return None
    return framed(signed_head(payload, base.key), base.ciphertext)


def _payload_bytes(random: Random, base: Base) -> bytes | None:
    payload = mutated_bytes(random, encode_canonical(base.content))
    try:
        value = cbor2.loads(payload)
        canonical = encode_canonical(value)
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        return framed(signed_head(payload, base.key), base.ciphertext)
    if payload == canonical and is_good(value, base):
        return None
    return framed(signed_head(payload, base.key), base.ciphertext)


def _outer(random: Random, base: Base) -> bytes | None:
    """COSE_Sign1 is not as it should be."""
    protected = {1: -8, 3: "application/shoal+cose", 4: base.key.key_id}
    changes: dict[str, Any] = random.choice(
        (
            {"unprotected": random.choice([value for value in NASTY if value != {}])},
            {"unprotected": {4: base.key.key_id}},
            {"protected": _odd_protected(random, protected)},
            {"protected": encode_canonical(protected) + b"\0"},
            {"protected": random.choice((protected, None, "", 0, []))},
            {"tag": random.choice((0, 16, 17, 19, 23, 98, 61))},
            {"more": [random.choice(NASTY)]},
        )
    )
    try:
        head = signed_head(encode_canonical(base.content), base.key, **changes)
    except (cbor2.CBOREncodeError, ValueError, TypeError):
        return None
    return framed(head, base.ciphertext)


def _outer_spelling(random: Random, base: Base) -> bytes | None:
    """The signature fits the parts, which are spelled in another way."""
    head = signed_head(encode_canonical(base.content), base.key)
    odd = b"\xd2" + respelled(random, decode_canonical(head[1:], limit_bytes=LIMIT_BYTES))
    return None if odd == head else framed(odd, base.ciphertext)


def _ciphertext(random: Random, base: Base) -> bytes | None:
    """The head is good, and what follows it is not what it speaks of."""
    return base.message[: -len(base.ciphertext)] + mutated_bytes(random, base.ciphertext)


def _context(random: Random, base: Base) -> bytes | None:
    """Good in every way, for somebody or something else."""
    changes, key = random.choice(_WRONG_CONTEXTS)
    if base.goes_up:
        kem = random.choice(list(KEMS.values()))
        return seal(up_header(**changes), b"body", signer=key or DEVICE_KEY, recipient=kem.public_key)
    return sign(
        down_header(**(changes | {"type": "ak"})), b"body", signer=OTHER_KEY if changes else DEVICE_KEY
    )


_WRONG_CONTEXTS: tuple[tuple[dict[str, Any], SigningKey | None], ...] = (
    ({"tenant": "rival"}, None),
    ({"fleet": "ankles"}, None),
    ({"type": "tm"}, None),
    ({"type": "ak"}, None),
    ({"direction": "down"}, None),
    ({"direction": "down"}, CLOUD_KEY),
    ({"device": "watch-2"}, None),
    ({"device": "watch-2"}, OTHER_KEY),
    ({}, OTHER_KEY),
    ({}, CLOUD_KEY),
    ({"expiry": int(NOW) - 61}, None),
    ({"expiry": 1}, None),
)


def _receipt(random: Random, base: Base) -> bytes | None:
    """A receipt, or anything else that goes down, made by a device or for another."""
    if base.goes_up:
        return None
    changes, key = random.choice(
        (
            ({}, DEVICE_KEY),
            ({}, OTHER_KEY),
            ({"device": "*"}, CLOUD_KEY),
            ({"device": "watch-2"}, CLOUD_KEY),
            ({"type": "md"}, CLOUD_KEY),
            ({"fleet": "ankles"}, CLOUD_KEY),
            ({"tenant": "rival"}, CLOUD_KEY),
            ({"type": "tm"}, CLOUD_KEY),
            ({"direction": "up"}, CLOUD_KEY),
            ({"expiry": int(NOW) - 100}, CLOUD_KEY),
        )
    )
    return sign(down_header(**changes), random.randbytes(20), signer=key)


def _extension(random: Random, base: Base) -> bytes | None:
    extensions: dict[Any, Any] = random.choice(
        (
            {random.randrange(1, 2**16): b"critical"},
            {-1: b"", 7: random.randbytes(4)},
            {0: b""},
            {-(2**16): b""},
            {-1: bytes(1025)},
            {-number: b"" for number in range(1, 10)},
            {"-1": b""},
            {-1: "text"},
        )
    )
    return _signed_content(base, [*base.content[:-1], extensions])


def _thief(random: Random, base: Base) -> bytes | None:
    """Another enrolled device signs what it has taken from the wire, as its own or as it was."""
    content = list(base.content)
    if random.random() < 0.5:
        content[0] = content[0] | {6: "watch-2"}
    return framed(signed_head(encode_canonical(content), OTHER_KEY), base.ciphertext)


def _sealing(random: Random, base: Base) -> bytes | None:
    """Sealed by a device that does not keep to the rules for records, keys or padding."""
    return sealed_oddly(random, random.choice(_ODD_SEALINGS), random.choice(list(KEMS.values())))


_ODD_SEALINGS = (
    "nonce", "index", "last", "header", "info", "key_length", "content_algorithm", "no_mark", "class", "zeros",
)  # fmt: skip


def sealed_oddly(random: Random, odd: str, kem: KemPrivateKey) -> bytes:
    """An update of `watch-1` in which one thing is done in another way than the protocol says."""
    algorithm, number = random.choice((("A256GCM", 3), ("C20P", 24)))
    header = up_header()
    bound = header_bytes(up_header(seq=42) if odd == "header" else header)
    body = random.randbytes(random.choice((0, 3, 200, 1500)))
    plaintext, padded = body, odd in ("no_mark", "class", "zeros")
    if odd == "no_mark":
        plaintext = body.ljust(len(body) + len(padding_to_class(len(body))), b"\x01")
    elif odd == "class":
        plaintext = body + padding_to_class(len(body)) + bytes(random.randrange(1, 300))
    elif odd == "zeros":
        plaintext = bytes(random.choice((256, 512)))
    content_key, iv = random_bytes(31 if odd == "key_length" else 32), random_bytes(12)
    to = encode_canonical({1: 49 if kem.algorithm == "x25519" else -70001, 4: kem.key_id})
    said = 27 - number if odd == "content_algorithm" else number
    info_header = header_bytes(up_header(round_number=8) if odd == "info" else header)
    encapsulated, wrapped = kem.public_key.wrap(
        content_key, info=encode_canonical(["HPKE Recipient", said, to, info_header])
    )
    protected = encode_canonical({1: said})
    aead = Aead(algorithm, content_key.ljust(32, b"\0"))
    pieces = [plaintext[at : at + 1024] for at in range(0, len(plaintext), 1024)] or [b""]
    records = []
    for index, piece in enumerate(pieces):
        shown = index + (odd == "index")
        external = encode_canonical([bound, shown, (index == len(pieces) - 1) != (odd == "last")])
        nonce = (int.from_bytes(iv, "big") ^ index ^ (odd == "nonce")).to_bytes(12, "big")
        record = memoryview(bytearray(len(piece) + 16))
        aead.seal_into(nonce, piece, encode_canonical(["Encrypt", protected, external]), record)
        records.append(bytes(record))
    encrypt = [protected, {5: iv}, None, [[to, {-4: encapsulated}, wrapped]]]
    content = [
        header_to_map(header),
        encrypt,
        [len(plaintext), 1024, padded],
        b"".join(map(sha256, records)),
        {},
    ]
    return framed(signed_head(encode_canonical(content), DEVICE_KEY), b"".join(records))


# --- without one ---


def _damaged(random: Random, base: Base) -> bytes | None:
    return mutated_bytes(random, base.message)


def _length(random: Random, base: Base) -> bytes | None:
    said = int.from_bytes(base.message[:4], "big")
    other = random.choice((0, 1, said - 1, said + 1, len(base.message), 2**31, 2**32 - 1))
    return other.to_bytes(4, "big") + base.message[4:]


def _noise(random: Random, base: Base) -> bytes | None:
    return random.randbytes(random.choice((0, 1, 3, 4, 5, 40, 600)))


def _framed_noise(random: Random, base: Base) -> bytes | None:
    head = encode_tagged(18, [random.choice(NASTY) for _ in range(4)])
    return framed(head, random.randbytes(random.randrange(20)))


def _unsigned_structure(random: Random, base: Base) -> bytes | None:
    """The content is another, and the signature is the old one."""
    payload = _encoded(mutated_value(random, base.content))
    if payload is None or payload == encode_canonical(base.content):
        return None
    end = 4 + int.from_bytes(base.message[:4], "big")
    outer = read_sign1(base.message[4:end], limit_bytes=LIMIT_BYTES)
    return framed(encode_tagged(18, [outer.protected, {}, payload, outer.signature]), base.ciphertext)


def _unprotected(random: Random, base: Base) -> bytes | None:
    """A man in the middle adds to the part that no signature covers."""
    end = 4 + int.from_bytes(base.message[:4], "big")
    outer = read_sign1(base.message[4:end], limit_bytes=LIMIT_BYTES)
    added = random.choice(({4: b"kid"}, {1: -7}, {"note": 1}, {33: bytes(40)}))
    return framed(
        encode_tagged(18, [outer.protected, added, outer.payload, outer.signature]), base.ciphertext
    )


def _signature(random: Random, base: Base) -> bytes | None:
    """A signature of another length, or another one of the right length."""
    end = 4 + int.from_bytes(base.message[:4], "big")
    outer = read_sign1(base.message[4:end], limit_bytes=LIMIT_BYTES)
    other = random.choice(
        (b"", outer.signature[1:], outer.signature + b"\0", bytes(64), outer.signature[::-1])
    )
    return framed(encode_tagged(18, [outer.protected, {}, outer.payload, other]), base.ciphertext)


def _stranger(random: Random, base: Base) -> bytes | None:
    """Signed by a key that is not enrolled, under its own key id or a device's."""
    protected = {1: -8, 3: "application/shoal+cose", 4: random.choice((STRANGER_KEY, base.key)).key_id}
    payload = encode_canonical(base.content)
    return framed(signed_head(payload, STRANGER_KEY, protected=encode_canonical(protected)), base.ciphertext)


def _splice(random: Random, base: Base) -> bytes | None:
    """The head of one good message and the records of another."""
    other = seal(
        up_header(seq=43),
        bytes(2500),
        signer=DEVICE_KEY,
        recipient=KEMS["x25519"].public_key,
        record_bytes=1024,
    )
    end = 4 + int.from_bytes(base.message[:4], "big")
    return base.message[:end] + other[4 + int.from_bytes(other[:4], "big") :]


def _large_head(random: Random, base: Base) -> bytes | None:
    """A head that is longer than any head of a message of this size."""
    return framed(base.message[4:].ljust(random.choice((20_000, 60_000, 400_000)), b"\0"), b"")


def _more(random: Random, base: Base) -> bytes | None:
    """A good message and something after it."""
    return base.message + random.choice((b"\0", base.ciphertext, base.message, random.randbytes(16))) or None


Maker = Callable[[Random, Base], "bytes | None"]
_SIGNED: tuple[Maker, ...] = (
    _structure, _structure, _element, _inner_protected, _header, _spelling, _payload_bytes, _payload_bytes, _outer,
    _outer_spelling, _ciphertext, _context, _receipt, _extension, _thief, _sealing,
)  # fmt: skip
_UNSIGNED: tuple[Maker, ...] = (
    _damaged, _damaged, _damaged, _damaged, _length, _noise, _framed_noise, _unsigned_structure, _unprotected,
    _signature, _stranger, _splice, _more, _large_head,
)  # fmt: skip
_OF_SEALED: tuple[Maker, ...] = (_inner_protected, _ciphertext, _sealing, _thief)


# --- what is good after all ---


def _signed_content(base: Base, content: Any) -> bytes | None:
    payload = _encoded(content)
    if payload is None or is_good(content, base):
        return None
    return framed(signed_head(payload, base.key), base.ciphertext)


def _encoded(value: Any) -> bytes | None:
    """Canonical CBOR, or None of something that has none."""
    try:
        return encode_canonical(value)
    except (cbor2.CBOREncodeError, ValueError, TypeError, OverflowError):
        return None


def is_good(content: Any, base: Base) -> bool:
    """Whether a signer may sign this content: ignorable extensions are free, and so is what a clear body says; the size
    of records is free where there is one record; and to say that padding is a part of the body."""
    if not isinstance(content, list) or len(content) != len(base.content):
        return False
    if not _are_ignorable(content[-1]):
        return False
    if not base.goes_up:
        return isinstance(content[1], bytes) and (
            _same(content[0], base.content[0]) or _may_say_down(content[0], base.content[0])
        )
    was, sizes = base.content[2], content[2]
    if not all(_same(content[at], base.content[at]) for at in (0, 1, 3)):
        return False
    if (
        not isinstance(sizes, list)
        or [type(size) for size in sizes] != [int, int, bool]
        or sizes[0] != was[0]
    ):
        return False
    is_same_cut = sizes[1] == was[1] or (sizes[0] <= 1024 and max(1024, sizes[0]) <= sizes[1] <= 122_864)
    return is_same_cut and (sizes[2] == was[2] or not sizes[2])


def _may_say_down(header: Any, was: dict[int, Any]) -> bool:
    """The cloud's header with other numbers, which nothing but the window and the clock decides on."""
    if not isinstance(header, dict):
        return False
    free = {7, 8, 9, 10, 11, 12, 13, 14, 15, 2}
    return all(_same(header.get(key), was.get(key)) for key in {*was, *header} - free)


def _are_ignorable(extensions: Any) -> bool:
    return (
        isinstance(extensions, dict)
        and len(extensions) <= 8
        and all(type(number) is int and -(2**16) < number < 0 for number in extensions)
        and all(type(value) is bytes and len(value) <= 1024 for value in extensions.values())
    )


def _same(one: Any, other: Any) -> bool:
    """Equal by their bytes: 1, 1.0 and True are three things."""
    data = _encoded(one)
    return data is not None and data == _encoded(other)
