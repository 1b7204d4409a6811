"""Canonical CBOR: what decodes re-encodes to the same bytes, and nothing but plain, bounded values decodes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.cbor import LONG_BYTES, MAX_DEPTH, decode_canonical, decode_tagged, encode_canonical, encode_tagged
from wire.errors import MessageError

LIMIT = 2**20
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.binary(max_size=40)
    | st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=5) | st.integers(-99, 99), inner, max_size=5)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_plain_value_round_trips(value: object) -> None:
    assert decode_canonical(encode_canonical(value), limit_bytes=LIMIT) == value


@given(st.binary(max_size=200))
def test_any_bytes_give_their_value_or_our_error(data: bytes) -> None:
    try:
        value = decode_canonical(data, limit_bytes=LIMIT)
    except MessageError:
        return
    assert encode_canonical(value) == data


@given(VALUES, st.data())
def test_any_damage_gives_another_value_or_our_error(value: object, data: st.DataObject) -> None:
    encoded = bytearray(encode_canonical(value))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode_canonical(bytes(encoded), limit_bytes=LIMIT)
    except MessageError:
        return
    assert encode_canonical(decoded) == bytes(encoded) != encode_canonical(value)


@given(st.lists(VALUES, max_size=3), st.integers(-2, 2), st.integers(1, 3))
def test_long_strings_round_trip_wherever_they_stand(values: list[object], beyond: int, count: int) -> None:
    long = bytes(LONG_BYTES + beyond)
    value = [*values, {"b": [long + bytes([number]) for number in range(count)], "a": long}, *values]
    assert decode_canonical(encode_canonical(value), limit_bytes=LIMIT) == value


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"\x5a\x00\x00\x10\x00", id="four_bytes_for_two"),
        pytest.param(b"\x5b\x00\x00\x00\x00\x00\x00\x10\x00", id="eight_bytes_for_two"),
        pytest.param(b"\x5f\x59\x10\x00", id="indefinite"),
        pytest.param(b"\x59\x10\x01", id="past_its_end"),
        pytest.param(b"\xd8\x40\x59\x10\x00", id="tagged"),
    ],
)
def test_long_string_is_refused_with_another_head_than_its_own(head: bytes) -> None:
    assert decode_canonical(b"\x59\x10\x00" + bytes(LONG_BYTES), limit_bytes=LIMIT) == bytes(LONG_BYTES)
    with pytest.raises(MessageError):
        decode_canonical(head + bytes(LONG_BYTES), limit_bytes=LIMIT)


def test_map_is_refused_when_its_long_strings_stand_in_another_order() -> None:
    a, b = (key + encode_canonical(bytes(LONG_BYTES)) for key in (b"\x61a", b"\x61b"))
    assert decode_canonical(b"\xa2" + a + b, limit_bytes=LIMIT) == {
        "a": bytes(LONG_BYTES),
        "b": bytes(LONG_BYTES),
    }
    for pair in (b + a, a + a):
        with pytest.raises(MessageError):
            decode_canonical(b"\xa2" + pair, limit_bytes=LIMIT)


def test_undefined_is_refused_beside_a_long_string() -> None:
    with pytest.raises(MessageError):
        decode_canonical(b"\x82" + encode_canonical(bytes(LONG_BYTES)) + b"\xf7", limit_bytes=LIMIT)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("0000", id="trailing_byte"),
        pytest.param("1801", id="number_longer_than_needed"),
        pytest.param("1b0000000000000001", id="number_of_eight_bytes_for_one"),
        pytest.param("fa3f800000", id="float_longer_than_needed"),
        pytest.param("f818", id="reserved_simple_value"),
        pytest.param("f0", id="unassigned_simple_value"),
        pytest.param("f7", id="undefined"),
        pytest.param("ff", id="break_alone"),
        pytest.param("9f01ff", id="indefinite_list"),
        pytest.param("5f4101ff", id="indefinite_bytes"),
        pytest.param("bf0101ff", id="indefinite_map"),
        pytest.param("1c", id="reserved_length"),
        pytest.param("a201020103", id="duplicate_key"),
        pytest.param("a202000100", id="keys_out_of_order"),
        pytest.param("a1810100", id="list_as_key"),
        pytest.param("a1410100", id="bytes_as_key"),
        pytest.param("a1f500", id="bool_as_key"),
        pytest.param("61ff", id="text_that_is_not_utf8"),
        pytest.param("5bffffffffffffffff", id="bytes_of_2_to_the_64"),
        pytest.param("9b0fffffffffffffff", id="list_of_2_to_the_60"),
        pytest.param("bb0fffffffffffffff", id="map_of_2_to_the_60"),
        pytest.param("820100ff", id="list_with_break_behind"),
        pytest.param("8201", id="list_that_ends_early"),
        pytest.param("19", id="number_that_ends_early"),
        pytest.param("c24101", id="big_number"),
        pytest.param("c5821b7fffffffffffffff01", id="big_float"),
        pytest.param("d81e82011864", id="rational"),
        pytest.param("d82366285b612d5d", id="regular_expression"),
        pytest.param("d81c81d81d00", id="list_that_holds_itself"),
        pytest.param("81d9d9f700", id="self_described_tag"),
        pytest.param("d28443a10126a04000", id="tagged_where_plain_is_expected"),
    ],
)
def test_decoding_refuses(text: str) -> None:
    with pytest.raises(MessageError):
        decode_canonical(bytes.fromhex(text), limit_bytes=LIMIT)


def test_decoding_refuses_what_is_longer_than_allowed_before_it_looks() -> None:
    with pytest.raises(MessageError, match="longer than allowed"):
        decode_canonical(b"\xff" * 11, limit_bytes=10)


def test_decoding_allows_the_deepest_nesting_and_refuses_one_more() -> None:
    deepest = b"\x81" * MAX_DEPTH + b"\x00"
    assert encode_canonical(decode_canonical(deepest, limit_bytes=LIMIT)) == deepest
    with pytest.raises(MessageError):
        decode_canonical(b"\x81" + deepest, limit_bytes=LIMIT)
    with pytest.raises(MessageError):
        decode_canonical(b"\x81" * 500_000 + b"\x00", limit_bytes=LIMIT)


def test_decoding_refuses_too_many_items() -> None:
    with pytest.raises(MessageError):
        decode_canonical(encode_canonical([0] * 70_000), limit_bytes=LIMIT)


def test_decoding_keeps_the_kinds_of_numbers_apart() -> None:
    assert type(decode_canonical(encode_canonical(1.0), limit_bytes=LIMIT)) is float
    assert type(decode_canonical(encode_canonical(1), limit_bytes=LIMIT)) is int
    assert math.isnan(decode_canonical(bytes.fromhex("f97e00"), limit_bytes=LIMIT))


def test_tagged_value_round_trips_under_its_tag_only() -> None:
    data = encode_tagged(18, [b"a", {}, 1])
    assert decode_tagged(data, 18, limit_bytes=LIMIT) == [b"a", {}, 1]
    for wrong in (data[1:], b"", b"\xd3" + data[1:], b"\xd2" + data):
        with pytest.raises(MessageError):
            decode_tagged(wrong, 18, limit_bytes=LIMIT)
