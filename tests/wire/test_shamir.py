"""Shares of a secret: enough of them give it back, fewer say nothing, and what cannot be shares is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.errors import UpdateError
from wire.shamir import combine, split


def shares_of(secret: bytes, threshold: int, count: int, seed: int = 1) -> list[tuple[int, bytes]]:
    made = split(secret, threshold=threshold, shares=count, random=random.Random(seed).randbytes)
    return list(enumerate(made, start=1))


@given(
    secret=st.binary(min_size=1, max_size=40),
    sizes=st.integers(1, 40).flatmap(lambda count: st.tuples(st.integers(1, count), st.just(count))),
    seed=st.integers(0, 2**32),
)
def test_any_threshold_of_the_shares_gives_the_secret_back(
    secret: bytes, sizes: tuple[int, int], seed: int
) -> None:
    threshold, count = sizes
    shares = shares_of(secret, threshold, count, seed)
    assert combine(random.Random(seed).sample(shares, threshold)) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """With one share missing each value of the missing one leads to another secret: all of them are possible."""
    shares = shares_of(b"\x42", 3, 5)
    assert len({combine([*shares[:2], (3, bytes([value]))]) for value in range(256)}) == 256


def test_largest_number_of_shares() -> None:
    shares = shares_of(bytes(range(16)), 200, 255)
    assert combine(shares[55:]) == bytes(range(16))


def test_known_answer() -> None:
    """f(x) = 7 + 3 x over GF(256): computed by hand with the polynomial of AES."""
    assert split(b"\x07", threshold=2, shares=3, random=lambda count: b"\x03" * count) == [
        b"\x04",
        b"\x01",
        b"\x02",
    ]
    assert combine([(1, b"\x04"), (3, b"\x02")]) == b"\x07"


def test_wrong_share_gives_another_secret() -> None:
    shares = shares_of(b"secret", 3, 5)
    point, right = shares[0]
    assert combine([(point, bytes([right[0] ^ 1]) + right[1:]), *shares[1:3]]) != b"secret"


@pytest.mark.parametrize(
    "shares",
    [
        [],
        [(1, b"a"), (1, b"a")],
        [(0, b"a"), (1, b"b")],
        [(256, b"a"), (1, b"b")],
        [(1, b"a"), (2, b"bc")],
    ],
    ids=["none", "same point", "point 0", "point 256", "lengths"],
)
def test_shares_that_cannot_be_are_refused(shares: list[tuple[int, bytes]]) -> None:
    with pytest.raises(UpdateError):
        combine(shares)


@pytest.mark.parametrize(
    ("threshold", "count", "secret"), [(0, 3, b"x"), (4, 3, b"x"), (2, 256, b"x"), (1, 1, b"")]
)
def test_sharings_that_cannot_be_are_refused(threshold: int, count: int, secret: bytes) -> None:
    with pytest.raises(UpdateError):
        split(secret, threshold=threshold, shares=count, random=random.Random(1).randbytes)
