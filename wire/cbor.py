"""The one door to cbor2: canonical CBOR out, strictly bounded canonical CBOR in.

Laws of the file: what decodes re-encodes to the same bytes (so there is one byte string per meaning); the
structure is walked and bounded before cbor2 sees a byte, because cbor2 would act on tags (big numbers,
regular expressions, shared references) while it decodes; nothing is decoded above the caller's byte limit;
any bytes in give a value or a `MessageError`; a long byte string (a model, an update) is copied once and never
encoded again. Source: RFC 8949 §4.2, docs/protocol.md, clause 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import cbor2

from wire.errors import MessageError

MAX_DEPTH: Final = 16
MAX_ITEMS: Final = 65_536
LONG_BYTES: Final = 4096
"""Byte strings from this length on are not given to cbor2: it would copy them, and encoding them again to compare
costs five times as much as all the rest."""

# Major types (RFC 8949 §3.1) and, of the lowest five bits, what this file knows by name.
_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE, _REFUSED = range(9)
_FALSE, _NULL, _ONE_BYTE, _HALF, _DOUBLE, _INFO = 20, 22, 24, 25, 27, 31
_BREAK: Final = 0xFF
_KEY_KINDS: Final = frozenset((_UNSIGNED, _NEGATIVE, _TEXT))
_STRING_KINDS: Final = frozenset((_BYTES, _TEXT))
_CONTAINER_KINDS: Final = frozenset((_ARRAY, _MAP))
_MARK: Final = b"\xf7"
_CBOR_FAILURES = (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError)


def encode_canonical(value: Any) -> bytes:
    """Deterministic encoding (RFC 8949 §4.2.1: shortest forms, sorted keys, definite lengths)."""
    return cbor2.dumps(value, canonical=True)


def encode_tagged(tag: int, value: Any) -> bytes:
    """The same under one CBOR tag."""
    return cbor2.dumps(cbor2.CBORTag(tag, value), canonical=True)


def encode_joined(items: Sequence[bytes]) -> bytes:
    """The array of items that are encoded already: what was encoded to be bound or hashed is not encoded twice."""
    return b"".join((_head(_ARRAY, len(items)), *items))


def byte_string_head(length: int) -> bytes:
    """The bytes in front of a byte string of `length`: for the one place where a string is put together by hand."""
    return _head(_BYTES, length)


def unsigned_bytes(value: int) -> bytes:
    """The encoding of an integer from 0 to 2⁶⁴ − 1."""
    return _head(_UNSIGNED, value)


def _head(major: int, argument: int) -> bytes:
    """The first bytes of an item, in the shortest form."""
    if argument < _ONE_BYTE:
        return bytes((major << 5 | argument,))
    exponent = max(0, (argument.bit_length() - 1).bit_length() - 3)
    return bytes((major << 5 | _ONE_BYTE + exponent,)) + argument.to_bytes(1 << exponent, "big")


def decode_canonical(data: bytes, *, limit_bytes: int) -> Any:
    """Decodes canonical CBOR of plain values: None, bool, int (64 bits), float, bytes, str, list, dict.

    Raises:
        MessageError: (peer) too long, not CBOR, trailing bytes, a tag or another type, nested or numerous
            beyond bounds, duplicate keys or not in canonical form.
    """
    _check_limit(data, limit_bytes)
    return _decode(data)


def decode_tagged(data: bytes, tag: int, *, limit_bytes: int) -> Any:
    """Decodes canonical CBOR of a plain value under exactly one tag (`tag` < 24), and returns the value.

    Raises:
        MessageError: (peer) as `decode_canonical`, or another tag.
    """
    _check_limit(data, limit_bytes)
    if not data or data[0] != _TAG << 5 | tag:
        raise MessageError("CBOR does not start with its tag", tag=tag)
    return _decode(data[1:])


def _check_limit(data: bytes, limit_bytes: int) -> None:
    if len(data) > limit_bytes:
        raise MessageError("CBOR is longer than allowed", size_bytes=len(data), limit_bytes=limit_bytes)


def _decode(data: bytes) -> Any:
    """Decodes what is left when each long byte string is replaced by a mark, and puts the strings back."""
    long = _walk(data)
    short = _without(data, long) if long else data
    try:
        value = cbor2.loads(
            short, max_depth=MAX_DEPTH + 2, allow_indefinite=False, allow_duplicate_keys=False
        )
        again = encode_canonical(value)
    except _CBOR_FAILURES as error:
        raise MessageError("not CBOR") from error
    if again != short or any(data[item.head : item.start] != item.shortest_head for item in long):
        raise MessageError("CBOR is not canonical")
    return _filled(value, (data[item.start : item.end] for item in long)) if long else value


class _Long(NamedTuple):
    """Where a long byte string lies: its head, its content and what follows."""

    head: int
    start: int
    end: int

    @property
    def shortest_head(self) -> bytes:
        return _head(_BYTES, self.end - self.start)


def _without(data: bytes, long: Sequence[_Long]) -> bytes:
    """The bytes with `undefined` in the place of each long string: a value that `_walk` refuses elsewhere."""
    starts = (0, *(item.end for item in long))
    ends = (*(item.head for item in long), len(data))
    return _MARK.join(data[start:end] for start, end in zip(starts, ends, strict=True))


def _filled(value: Any, strings: Iterator[bytes]) -> Any:
    """The value with the strings in the places of their marks, in the order in which both were read."""
    if value is cbor2.undefined:
        return next(strings)
    if isinstance(value, list):
        return [_filled(item, strings) for item in value]
    if isinstance(value, dict):
        return {key: _filled(item, strings) for key, item in value.items()}
    return value


def _walk(data: bytes) -> list[_Long]:
    """Checks the shape of one item and that nothing follows it, without building anything.

    `outer` holds, for each container around the current one, how many items are still to come and whether
    it is a map, whose keys stand where an even number is to come. Lengths are compared with what is there
    before they are believed.

    Returns:
        The long byte strings, in order.
    """
    end = len(data)
    at = items = 0
    outer: list[tuple[int, bool]] = []
    long: list[_Long] = []
    left, in_map = 1, False
    while left or outer:
        if left == 0:
            left, in_map = outer.pop()
            continue
        initial = data[at] if at < end else _BREAK
        kind = _KINDS[initial]
        if kind == _REFUSED or items == MAX_ITEMS:
            raise MessageError(
                "CBOR ends early, has too many items or holds something of no plain type", at=at
            )
        if in_map and not left & 1 and kind not in _KEY_KINDS:
            raise MessageError("CBOR map key is neither a number nor text", at=at)
        left -= 1
        items += 1
        head = at
        at += 1
        argument = initial & _INFO
        if argument >= _ONE_BYTE:
            argument, at = _argument(data, at, end, 1 << argument - _ONE_BYTE)
        if kind in _STRING_KINDS:
            if argument > end - at:
                raise MessageError("CBOR string runs past its end", at=at)
            at += argument
            if kind == _BYTES and argument >= LONG_BYTES:
                long.append(_Long(head, at - argument, at))
        elif kind in _CONTAINER_KINDS:
            if argument > end - at or len(outer) == MAX_DEPTH:
                raise MessageError("CBOR container runs past its end or is nested too deep", at=at)
            outer.append((left, in_map))
            in_map = kind == _MAP
            left = 2 * argument if in_map else argument
    if at != end:
        raise MessageError("CBOR is followed by other bytes", at=at)
    return long


def _argument(data: bytes, at: int, end: int, width: int) -> tuple[int, int]:
    """Reads the `width` bytes of an argument at `at`; returns it and where the item's content starts."""
    if width > end - at:
        raise MessageError("CBOR ends early", at=at)
    return int.from_bytes(data[at : at + width], "big"), at + width


def _kind(initial: int) -> int:
    """What an item is by its first byte; tags, indefinite and reserved lengths and odd simple values are
    refused."""
    major, info = initial >> 5, initial & _INFO
    if major == _SIMPLE:
        return _SIMPLE if _FALSE <= info <= _NULL or _HALF <= info <= _DOUBLE else _REFUSED
    return major if info <= _DOUBLE and major != _TAG else _REFUSED


_KINDS: Final = bytes(_kind(initial) for initial in range(256))
