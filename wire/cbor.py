"""The one door to cbor2: canonical CBOR out, strictly bounded canonical CBOR in.

Laws of the file: what decodes re-encodes to the same bytes (so there is one byte string per meaning); nothing is
decoded above the caller's byte limit; any bytes in give a value or a `MessageError`. Source: RFC 8949 §4.2.
"""

from __future__ import annotations

from typing import Any

import cbor2

from wire.errors import MessageError


def encode_canonical(value: Any) -> bytes:
    """Deterministic encoding (RFC 8949 §4.2.1: shortest forms, sorted keys, definite lengths)."""
    return cbor2.dumps(value, canonical=True)


def decode_canonical(data: bytes, *, limit_bytes: int) -> Any:
    """Decodes canonical CBOR of plain values.

    Raises:
        MessageError: (peer) too long, not CBOR, trailing bytes, duplicate keys or not in canonical form.
    """
    if len(data) > limit_bytes:
        raise MessageError("CBOR is longer than allowed", size_bytes=len(data), limit_bytes=limit_bytes)
    try:
        value = cbor2.loads(data)
        again = encode_canonical(value)
    except (cbor2.CBORError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise MessageError("not CBOR") from error
    if again != data:
        raise MessageError("CBOR is not canonical")
    return value
