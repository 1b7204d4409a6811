"""The one door to cbor2: canonical CBOR out, strictly bounded canonical CBOR in.

Laws of the file: what decodes re-encodes to the same bytes (so there is one byte string per meaning); the
structure is walked and bounded before cbor2 sees a byte, because cbor2 would act on tags (big numbers,
regular expressions, shared references) while it decodes; nothing is decoded above the caller's byte limit;
any bytes in give a value or a `MessageError`. Source: RFC 8949 §4.2, docs/protocol.md, clause 1.
"""

from __future__ import annotations

from typing import Any, Final

import cbor2

from wire.errors import MessageError

MAX_DEPTH: Final = 16
MAX_ITEMS: Final = 65_536

_BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = 2, 3, 4, 5, 6, 7
_KEY_MAJORS = (0, 1, 3)
_FALSE, _NULL, _HALF, _DOUBLE = 20, 22, 25, 27
_CBOR_FAILURES = (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError)


def encode_canonical(value: Any) -> bytes:
    """Deterministic encoding (RFC 8949 §4.2.1: shortest forms, sorted keys, definite lengths)."""
    return cbor2.dumps(value, canonical=True)


def encode_tagged(tag: int, value: Any) -> bytes:
    """The same under one CBOR tag."""
    return cbor2.dumps(cbor2.CBORTag(tag, value), canonical=True)


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
    _walk(data)
    try:
        value = cbor2.loads(data, max_depth=MAX_DEPTH + 2, allow_indefinite=False, allow_duplicate_keys=False)
        again = encode_canonical(value)
    except _CBOR_FAILURES as error:
        raise MessageError("not CBOR") from error
    if again != data:
        raise MessageError("CBOR is not canonical")
    return value


def _walk(data: bytes) -> None:
    """Checks the shape of one item and that nothing follows it, without building anything.

    `left` holds, for each open container, how many items are still to come and whether it is a map (whose
    keys are those at an even count). Lengths are compared with what is there before they are believed.
    """
    end = len(data)
    at = items = 0
    left: list[list[int]] = [[1, 0]]
    while left:
        top = left[-1]
        if top[0] == 0:
            left.pop()
            continue
        is_key = top[1] and top[0] % 2 == 0
        top[0] -= 1
        items += 1
        if items > MAX_ITEMS:
            raise MessageError("CBOR has too many items", limit=MAX_ITEMS)
        major, argument, at = _head(data, at, end)
        if is_key and major not in _KEY_MAJORS:
            raise MessageError("CBOR map key is neither a number nor text")
        if major in (_BYTES, _TEXT):
            if argument > end - at:
                raise MessageError("CBOR string runs past its end")
            at += argument
        elif major in (_ARRAY, _MAP):
            if argument > end - at:
                raise MessageError("CBOR container runs past its end")
            if len(left) > MAX_DEPTH:
                raise MessageError("CBOR is nested too deep", limit=MAX_DEPTH)
            left.append([2 * argument, 1] if major == _MAP else [argument, 0])
    if at != end:
        raise MessageError("CBOR is followed by other bytes")


def _head(data: bytes, at: int, end: int) -> tuple[int, int, int]:
    """Reads one head; returns (major type, argument, where its content starts)."""
    if at >= end:
        raise MessageError("CBOR ends early")
    major, info = data[at] >> 5, data[at] & 31
    at += 1
    if major == _TAG:
        raise MessageError("CBOR holds a tag")
    if info < 24:
        if major == _SIMPLE and not _FALSE <= info <= _NULL:
            raise MessageError("CBOR holds a value of no plain type")
        return major, info, at
    if info > _DOUBLE:
        raise MessageError("CBOR has an indefinite or reserved length")
    if major == _SIMPLE and info < _HALF:
        raise MessageError("CBOR holds a value of no plain type")
    width = 1 << (info - 24)
    if width > end - at:
        raise MessageError("CBOR ends early")
    return major, int.from_bytes(data[at : at + width], "big"), at + width
