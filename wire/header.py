"""The header of every message: who says what to whom, for which round, how fresh.

It is always signed, and bound into the sealing. Laws of the file: pure; one header has one byte string
(compact integer keys, values equal to the default absent, canonical CBOR); any bytes in give a `Header` or a
`MessageError`. Source: docs/protocol.md, clause 4.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from wire.cbor import encode_canonical
from wire.errors import MessageError

VERSION: Final = 1
ALL_DEVICES: Final = "*"
"""The `device` of a message downward that is meant for every device of the fleet."""

_Id = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
_Counter = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_Hash = Annotated[bytes, Meta(max_length=32)]


class Header(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a receiver may know and must check before it opens a body.

    Attributes:
        version: of the envelope; this code speaks 1.
        type: two to sixteen lower-case letters: the `TYPE` of the body (docs/protocol.md, clause 3).
        direction: `up` (a device speaks) or `down` (the cloud speaks).
        device: who speaks (up) or is spoken to (down); `*` for all devices (down only).
        epoch: number of the sender's counter: grows when the sender lost its place, never falls.
        seq: number within the epoch; (sender, type, epoch, seq) never names two plaintexts.
        run: training campaign, or empty.
        base: SHA-256 of what an update is a difference to, or empty.
        schema: SHA-256 that names the layout of the parameters (`graphs_sha256`), or empty.
        expiry: last second (since 1970) at which the message may be opened; 0 for never.
        part: of `parts`, for a body that travels as several messages.
    """

    version: Literal[1] = VERSION
    type: Annotated[str, Meta(pattern=r"^[a-z]{2,16}\Z")]
    direction: Literal["up", "down"]
    tenant: _Id
    fleet: _Id
    device: Annotated[str, Meta(pattern=r"^(?:\*|[A-Za-z0-9_-]{1,64})\Z")]
    epoch: _Counter
    seq: _Counter
    run: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{0,64}\Z")] = ""
    round_number: _Counter = 0
    base: _Hash = b""
    schema: _Hash = b""
    expiry: _Counter = 0
    part: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    parts: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 1


_KEY_OF: Final[dict[str, int]] = {
    "version": 1,
    "type": 2,
    "direction": 3,
    "tenant": 4,
    "fleet": 5,
    "device": 6,
    "epoch": 7,
    "seq": 8,
    "run": 9,
    "round_number": 10,
    "base": 11,
    "schema": 12,
    "expiry": 13,
    "part": 14,
    "parts": 15,
}
_NAME_OF: Final = {key: name for name, key in _KEY_OF.items()}
_DEFAULTS: Final[dict[str, Any]] = {
    "run": "",
    "round_number": 0,
    "base": b"",
    "schema": b"",
    "expiry": 0,
    "part": 0,
    "parts": 1,
}


def header_to_map(header: Header) -> dict[int, Any]:
    """The header as it stands in a message: integer keys, default values absent, version present."""
    plain: dict[int, Any] = {}
    for name, key in _KEY_OF.items():
        value = getattr(header, name)
        if name in _DEFAULTS and value == _DEFAULTS[name]:
            continue
        plain[key] = value
    return plain


def header_from_map(plain: object) -> Header:
    """Reads what `header_to_map` made.

    Raises:
        MessageError: (peer) not a map, an unknown key, a default value that is spelled out, a value out of
            bounds.
    """
    if type(plain) is not dict:
        raise MessageError("header is not a map")
    named: dict[str, Any] = {}
    for key, value in plain.items():
        name = _NAME_OF.get(key) if type(key) is int else None
        if name is None:
            raise MessageError("header has an unknown key")
        if name in _DEFAULTS and value == _DEFAULTS[name]:
            raise MessageError("header spells a default value out", name=name)
        named[name] = value
    if "version" not in named:
        raise MessageError("header has no version")
    return _checked(named)


def check_header(header: Header) -> Header:
    """Returns the header if a receiver would accept it (msgspec does not check what we construct).

    Raises:
        MessageError: (us) a value is out of bounds.
    """
    return _checked({name: getattr(header, name) for name in _KEY_OF})


def header_bytes(header: Header) -> bytes:
    """Canonical bytes, which the sealing is bound to."""
    return encode_canonical(header_to_map(header))


def _checked(named: dict[str, Any]) -> Header:
    try:
        # Named as built in, bytes stay bytes: by default msgspec would read text as base64.
        header = msgspec.convert(named, type=Header, strict=True, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise MessageError(f"header is not valid: {error}") from error
    if header.part >= header.parts:
        raise MessageError("header's part is not below its parts")
    if header.direction == "up" and header.device == ALL_DEVICES:
        raise MessageError("a message upward names its device")
    return header
