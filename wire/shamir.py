"""A secret in shares, any `threshold` of which give it back and fewer of which say nothing: Shamir over GF(2^8).

Laws of the file: pure; every byte of the secret is shared by a polynomial of its own; the point of a share (1 … 255)
travels with it or follows from its place, never from its bytes. Whoever combines must check the result against
something: a wrong share gives a wrong secret and no error. Source: Shamir, "How to share a secret", 1979; the field is
that of AES (FIPS 197, x^8 + x^4 + x^3 + x + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from wire.errors import UpdateError

MAX_SHARES: Final = 255
_Bytes = NDArray[np.uint8]


def _tables() -> tuple[_Bytes, NDArray[np.int64]]:
    """Powers of the generator 3 (twice, so that a sum of two logarithms needs no modulo), and logarithms."""
    power, logarithm, value = np.zeros(510, np.uint8), np.zeros(256, np.int64), 1
    for exponent in range(255):
        power[exponent] = power[exponent + 255] = value
        logarithm[value] = exponent
        value ^= value << 1
        value ^= 0x11B if value & 0x100 else 0
    return power, logarithm


_POWER, _LOG = _tables()


def _multiply(a: _Bytes, b: _Bytes) -> _Bytes:
    product: _Bytes = _POWER[_LOG[a] + _LOG[b]]
    return np.where((a == 0) | (b == 0), np.uint8(0), product).astype(np.uint8)


def split(secret: bytes, *, threshold: int, shares: int, random: Callable[[int], bytes]) -> list[bytes]:
    """Cuts a secret into shares of its own length; the share at place *i* belongs to the point *i* + 1.

    Args:
        random: gives that many unpredictable bytes.

    Raises:
        UpdateError: (us) not 1 ≤ threshold ≤ shares ≤ 255, or nothing to share.
    """
    if not 1 <= threshold <= shares <= MAX_SHARES or not secret:
        raise UpdateError("no such sharing", threshold=threshold, shares=shares, size_bytes=len(secret))
    drawn = random((threshold - 1) * len(secret))
    coefficients = np.frombuffer(secret + drawn, np.uint8).reshape(threshold, len(secret))
    points = np.arange(1, shares + 1, dtype=np.uint8)[:, None]
    values = np.zeros((shares, len(secret)), np.uint8)
    for coefficient in coefficients[::-1]:
        values = _multiply(values, points) ^ coefficient
    return [row.tobytes() for row in values]


def combine(shares: Sequence[tuple[int, bytes]]) -> bytes:
    """The secret from exactly `threshold` shares with their points.

    Raises:
        UpdateError: (peer) no share, a point that is not one or occurs twice, or shares of different lengths.
    """
    points = [point for point, _ in shares]
    lengths = {len(share) for _, share in shares}
    if not shares or len(set(points)) != len(points) or len(lengths) != 1:
        raise UpdateError("shares do not belong together", shares=len(shares))
    if not all(1 <= point <= MAX_SHARES for point in points):
        raise UpdateError("a share has no such point")
    values = np.frombuffer(b"".join(share for _, share in shares), np.uint8).reshape(len(shares), -1)
    secret = np.bitwise_xor.reduce(_multiply(values, _weights(points)[:, None]), axis=0)
    return np.asarray(secret, np.uint8).tobytes()


def _weights(points: Sequence[int]) -> _Bytes:
    """Lagrange's coefficients at zero: for each point the product of m / (m − point) over the others."""
    at = np.array(points, np.int64)
    logarithms = _LOG[at]
    differences = _LOG[at[:, None] ^ at[None, :]]
    np.fill_diagonal(differences, 0)
    exponents = (logarithms.sum() - logarithms) - differences.sum(axis=1)
    return np.asarray(_POWER[exponents % 255], np.uint8)
