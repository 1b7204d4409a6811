"""Checkpoints: one byte string per meaning, and any bytes in give a checkpoint or a `BundleError`."""

from __future__ import annotations

import hashlib

import cbor2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from wire.checkpoint import Checkpoint
from wire.errors import BundleError

EMPTY = np.zeros((0, 2), np.float32)
ZERO = np.zeros(0, np.float32)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def vector(*values: float) -> np.ndarray:  # type: ignore[type-arg]
    return np.array(values, np.float32)


def test_bytes_are_the_documented_vector() -> None:
    checkpoint = Checkpoint(vector(1.0, -2.0), vector(0.5), np.array([[-1, 3]], np.float32))
    # By hand: map of 4, keys by length then bytes; "format": 1, three byte strings of little-endian float32.
    expected = (
        b"\xa4"
        + b"\x66format\x01"
        + b"\x66params\x48" + bytes.fromhex("0000803f000000c0")
        + b"\x66ranges\x48" + bytes.fromhex("000080bf00004040")
        + b"\x67buffers\x44" + bytes.fromhex("0000003f")
    )  # fmt: skip
    assert checkpoint.to_bytes() == expected
    assert checkpoint.sha256 == hashlib.sha256(expected).digest()


@given(
    params=stn.arrays(np.float32, st.integers(0, 20), elements=floats),
    buffers=stn.arrays(np.float32, st.integers(0, 5), elements=floats),
    ranges=stn.arrays(np.float32, st.tuples(st.integers(0, 5), st.just(2)), elements=floats),
)
def test_round_trip_keeps_every_bit(
    params: np.ndarray,
    buffers: np.ndarray,
    ranges: np.ndarray,  # type: ignore[type-arg]
) -> None:
    ranges = np.sort(ranges, axis=1)
    checkpoint = Checkpoint(params, buffers, ranges)
    again = Checkpoint.from_bytes(checkpoint.to_bytes())
    assert again == checkpoint
    for name, wanted in (("params", params), ("buffers", buffers), ("ranges", ranges)):
        assert getattr(again, name).tobytes() == wanted.tobytes()


@given(st.binary(max_size=200))
def test_any_bytes_give_a_checkpoint_or_our_error(data: bytes) -> None:
    try:
        checkpoint = Checkpoint.from_bytes(data)
    except BundleError:
        return
    assert checkpoint.to_bytes() == data


GOOD = {"format": 1, "params": bytes(8), "buffers": b"", "ranges": bytes(8)}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": True},
        {"format": 1.0},
        {"params": bytes(7)},
        {"params": [0.0]},
        {"params": "text"},
        {"ranges": bytes(4)},
        {"ranges": np.array([2.0, 1.0], "<f4").tobytes()},
        {"params": np.array([np.nan], "<f4").tobytes()},
        {"buffers": np.array([np.inf], "<f4").tobytes()},
        {"extra": 1},
    ],
    ids=lambda change: str(change)[:40],
)
def test_wrong_map_is_refused(change: dict[str, object]) -> None:
    assert Checkpoint.from_bytes(cbor2.dumps(GOOD, canonical=True)).params.shape == (2,)
    with pytest.raises(BundleError):
        Checkpoint.from_bytes(cbor2.dumps({**GOOD, **change}, canonical=True))


@pytest.mark.parametrize("missing", sorted(GOOD))
def test_missing_key_is_refused(missing: str) -> None:
    with pytest.raises(BundleError):
        Checkpoint.from_bytes(cbor2.dumps({k: v for k, v in GOOD.items() if k != missing}, canonical=True))


def test_other_byte_strings_of_the_same_meaning_are_refused() -> None:
    data = cbor2.dumps(GOOD, canonical=True)
    unsorted = cbor2.dumps(dict(reversed(GOOD.items())), canonical=False)
    for other in (data + b"\0", unsorted):
        with pytest.raises(BundleError):
            Checkpoint.from_bytes(other)


def test_length_above_the_limit_is_refused_before_decoding() -> None:
    data = Checkpoint(np.zeros(100, np.float32), ZERO, EMPTY).to_bytes()
    assert Checkpoint.from_bytes(data, limit_bytes=len(data)).params.size == 100
    with pytest.raises(BundleError, match="longer"):
        Checkpoint.from_bytes(data, limit_bytes=len(data) - 1)


@pytest.mark.parametrize(
    ("params", "buffers", "ranges"),
    [
        (np.zeros(2, np.float64), ZERO, EMPTY),
        (np.zeros((1, 2), np.float32), ZERO, EMPTY),
        (vector(np.nan), ZERO, EMPTY),
        (ZERO, vector(np.inf), EMPTY),
        (ZERO, ZERO, np.zeros((1, 3), np.float32)),
        (ZERO, ZERO, np.array([[1, 0]], np.float32)),
        ([1.0], ZERO, EMPTY),
    ],
)
def test_wrong_arrays_are_refused(params: object, buffers: object, ranges: object) -> None:
    with pytest.raises(BundleError):
        Checkpoint(params, buffers, ranges)  # type: ignore[arg-type]


def test_a_caller_cannot_change_a_checkpoint_afterwards() -> None:
    params = vector(1.0, 2.0)
    checkpoint = Checkpoint(params, ZERO, EMPTY)
    before = checkpoint.sha256
    params[0] = 9.0
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.params[0] = 9.0
    assert Checkpoint(checkpoint.params, ZERO, EMPTY).sha256 == before
