"""From when until when a certificate is valid, read without an X.509 library: the one at hand takes 3 MiB, and an
agent asks for nothing else of its own certificate while it runs.

Laws of the file: for what is shown and warned about; whom to trust is decided by TLS, and what is issued by
`wire/primitives.py`. Any bytes in give two times or a `TrustError`. Sources: RFC 5280 §4.1 (the order of the fields)
and §4.1.2.5 (the two spellings of a time), X.690 §8.1 (tag and length).
"""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from typing import Final

from wire.errors import TrustError

_INTEGER, _UTC_TIME, _GENERALIZED_TIME, _SEQUENCE, _VERSION = 0x02, 0x17, 0x18, 0x30, 0xA0
_LONG_FORM: Final = 0x80
_FIRST_YEAR: Final = 50  # of two digits: 50 to 99 are of the twentieth century
_TIME_DIGITS: Final = {_UTC_TIME: 12, _GENERALIZED_TIME: 14}


def validity_of(pem: bytes) -> tuple[float, float]:
    """Of the first certificate in `pem`, in seconds since 1970.

    Raises:
        TrustError: not a certificate.
    """
    try:
        first, footer, _ = pem.decode("ascii").strip().partition(ssl.PEM_FOOTER)
        whole = ssl.PEM_cert_to_DER_cert(first + footer)
        (_, certificate), _ = _item(whole, _SEQUENCE)
        (_, fields), _ = _item(certificate, _SEQUENCE)
        if fields[:1] == bytes((_VERSION,)):
            _, fields = _item(fields, _VERSION)
        _, fields = _item(fields, _INTEGER)
        _, fields = _item(fields, _SEQUENCE)  # the signature's algorithm
        _, fields = _item(fields, _SEQUENCE)  # the issuer
        (_, validity), _ = _item(fields, _SEQUENCE)
        begins, rest = _item(validity, *_TIME_DIGITS)
        ends, rest = _item(rest, *_TIME_DIGITS)
        if rest:
            raise ValueError("a validity of more than two times")
        return _seconds(*begins), _seconds(*ends)
    except ValueError as error:
        raise TrustError("not a certificate in PEM") from error


def _item(data: bytes, *tags: int) -> tuple[tuple[int, bytes], bytes]:
    """The first item, as its tag, which must be one of `tags`, and its content; and what follows it."""
    if len(data) < 2 or data[0] not in tags:
        raise ValueError("another item was expected")
    length, start = data[1], 2
    if length & _LONG_FORM:
        width = length - _LONG_FORM
        length, start = int.from_bytes(data[2 : 2 + width], "big"), 2 + width
    end = start + length
    if end > len(data):
        raise ValueError("an item runs past its end")
    return (data[0], data[start:end]), data[end:]


def _seconds(tag: int, text: bytes) -> float:
    """Both spellings end in seconds and a Z; only the century is missing in the shorter one."""
    digits = _TIME_DIGITS[tag]
    if len(text) != digits + 1 or not text[:digits].isdigit() or text[digits:] != b"Z":
        raise ValueError("not a time as certificates have it")
    pairs = [int(text[at : at + 2]) for at in range(0, digits, 2)]
    if tag == _UTC_TIME:
        pairs.insert(0, 19 if pairs[0] >= _FIRST_YEAR else 20)
    century, year, month, day, hour, minute, second = pairs
    return datetime(100 * century + year, month, day, hour, minute, second, tzinfo=UTC).timestamp()
