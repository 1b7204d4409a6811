"""Update codecs: error and bytes within what they promise, unbiased where they promise it, strict when they
read."""

from __future__ import annotations

import struct
import zlib
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.wire.parties import DEVICE_KEY, KEM, up_header
from wire.chunks import split
from wire.codec import (
    BLOCK,
    DITHER_BUDGET_BITS,
    FEEDBACK_CODECS,
    ErrorFeedback,
    Float32,
    decode,
    decode_into,
    encode,
)
from wire.dither import STEPS, dither, dither_blocks, step_codes
from wire.envelope import seal
from wire.errors import ShoalError, StorageError, UpdateError
from wire.messages import CODEC_NAMES, Update, encode_body

SIZES = [1, 2, 3, 7, 8, 255, 256, 257, 1000, 65_536, 65_537, 70_001]
UNBIASED = ["int8", "int4", "dithered"]
DEFLATABLE = ["int8", "int4", "int2", "sign", "dithered"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def update(size: int, seed: int = 1) -> Float32:
    """Like a real one: heavy tails, layers of different scale, a part that did not move."""
    generator = rng(seed)
    scales = 10.0 ** generator.uniform(-4, -1, size // 2000 + 1)
    vector = generator.laplace(size=size) * np.repeat(scales, 2000)[:size]
    vector[size // 3 : size // 3 + 600] = 0
    return cast(Float32, vector.astype(np.float32))


def relative_error(decoded: Float32, vector: Float32) -> float:
    return float(
        np.square(decoded - vector, dtype=np.float64).sum() / np.square(vector, dtype=np.float64).sum()
    )


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_vector_of_any_size_round_trips(codec: str, size: int) -> None:
    vector = update(size)
    vector[0] = 0.125
    data = encode(vector, codec, rng())
    decoded = decode(data, codec, size)
    assert decoded.dtype == np.float32
    assert decoded.shape == (size,)
    assert np.isfinite(decoded).all()
    assert relative_error(decoded, vector) < 3


@pytest.mark.parametrize(
    ("codec", "most_bytes", "most_error"),
    [
        ("fp32", 1.001, 0.0),
        ("fp16", 0.501, 1e-6),
        ("int8", 0.22, 3e-4),
        ("int4", 0.09, 0.07),
        ("int2", 0.064, 0.3),
        ("sign", 0.034, 0.6),
        ("dithered", 0.054, 0.25),
    ],
)
def test_codec_keeps_its_promise_of_bytes_and_error(codec: str, most_bytes: float, most_error: float) -> None:
    vector = update(60_000)
    data = encode(vector, codec, rng())
    assert len(data) <= most_bytes * vector.nbytes
    assert relative_error(decode(data, codec, len(vector)), vector) <= most_error


@pytest.mark.parametrize("draw", ["standard_normal", "standard_cauchy", "random"])
def test_dithered_keeps_to_its_budget_whatever_the_distribution(draw: str) -> None:
    vector = (getattr(rng(), draw)(26_000) * 0.01).astype(np.float32)
    for budget_bits in (1.5, DITHER_BUDGET_BITS, 3.0):
        data = encode(vector, "dithered", rng(), budget_bits=budget_bits)
        assert 8 * len(data) <= budget_bits * len(vector) * 1.02
    with_more = decode(encode(vector, "dithered", rng(), budget_bits=3.0), "dithered", len(vector))
    with_less = decode(encode(vector, "dithered", rng(), budget_bits=1.5), "dithered", len(vector))
    assert relative_error(with_more, vector) <= relative_error(with_less, vector)


def test_whole_update_message_is_at_most_six_and_a_half_percent_of_float32() -> None:
    """Body, padding, envelope and chunk headers included, for the size of the smartwatch model."""
    for seed in range(5):
        vector = update(24_103, seed)
        body = Update(
            update_id=bytes(16),
            order_id=bytes(16),
            run="spring-2027",
            round_number=12,
            base_sha256=bytes(32),
            num_examples=140,
            codec="dithered",
            params_size=len(vector),
            payload=encode(vector, "dithered", rng(seed)),
            metrics={"loss": 0.512, "accuracy": 0.81},
        )
        message = seal(up_header(), encode_body(body), signer=DEVICE_KEY, recipient=KEM.public_key, pad=True)
        assert sum(len(chunk) for chunk in split(message)) <= 0.065 * vector.nbytes


@pytest.mark.parametrize("codec", UNBIASED)
def test_mean_over_many_encodings_is_the_vector(codec: str) -> None:
    vector = update(2 * BLOCK, seed=4)
    vector[:BLOCK] = rng(5).normal(size=BLOCK) * 0.01
    generator, repeats = rng(7), 800
    total, squares = np.zeros(len(vector)), np.zeros(len(vector))
    for _ in range(repeats):
        decoded = decode(encode(vector, codec, generator), codec, len(vector)).astype(np.float64)
        total += decoded
        squares += np.square(decoded - vector)
    deviation = np.sqrt(squares / repeats) / np.sqrt(repeats)
    bias = np.abs(total / repeats - vector)
    # Of 512 means one may be four deviations off; a biased codec is off by dozens.
    assert np.quantile(bias[deviation > 0] / deviation[deviation > 0], 0.99) < 3.5
    assert (bias[deviation == 0] < 1e-6).all()


def test_error_of_dithered_does_not_depend_on_the_value() -> None:
    vector = (np.arange(256 * 400) % 256 / 256 - 0.5).astype(np.float32)
    error = decode(encode(vector, "dithered", rng()), "dithered", len(vector)) - vector
    by_value = error.reshape(400, 256).std(axis=0)
    assert by_value.max() / by_value.min() < 1.3
    assert abs(np.corrcoef(vector, error)[0, 1]) < 0.02


@pytest.mark.parametrize("codec", ["int8", "int4", "int2", "sign", "dithered"])
def test_block_that_did_not_move_stays_exactly_still(codec: str) -> None:
    vector = update(10 * BLOCK)
    vector[3 * BLOCK : 5 * BLOCK] = 0
    decoded = decode(encode(vector, codec, rng()), codec, len(vector))
    assert (decoded[3 * BLOCK : 5 * BLOCK] == 0).all()
    nothing = np.zeros(300, np.float32)
    assert (decode(encode(nothing, codec, rng()), codec, 300) == 0).all()


@settings(max_examples=60)
@given(
    st.sampled_from(CODEC_NAMES),
    hnp.arrays(
        np.float32,
        st.integers(1, 700),
        elements=st.floats(-1000, 1000, width=32),
        fill=st.just(np.float32(0)),
    ),
    st.integers(0, 99),
)
def test_any_finite_vector_decodes_close_to_itself(codec: str, vector: Float32, seed: int) -> None:
    decoded = decode(encode(vector, codec, rng(seed)), codec, len(vector))
    blocks = np.pad(vector, (0, -len(vector) % BLOCK)).reshape(-1, BLOCK)
    largest = np.repeat(np.abs(blocks).max(axis=1), BLOCK)[: len(vector)]
    worst = {
        "fp32": 0.0,
        "fp16": 1e-3,
        "int8": 0.009,
        "int4": 0.16,
        "int2": 2.0,
        "sign": 2.0,
        "dithered": 1.25,
    }
    assert (np.abs(decoded - vector) <= worst[codec] * largest + 1e-6).all()


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("size", [5, 70_001])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_decoding_into_an_accumulator_adds_the_weighted_vector(codec: str, size: int, kind: type) -> None:
    data = encode(update(size), codec, rng())
    out = rng(3).normal(size=size).astype(kind)
    expected = out + 0.25 * decode(data, codec, size)
    decode_into(out, data, codec, weight=0.25)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_same_generator_gives_same_bytes(codec: str) -> None:
    vector = update(5000)
    assert encode(vector, codec, rng(9)) == encode(vector, codec, rng(9))


# --- error feedback ---


@pytest.mark.parametrize("codec", sorted(FEEDBACK_CODECS))
def test_error_feedback_sends_in_time_what_the_codec_leaves_out(codec: str) -> None:
    generator = rng(2)
    direction = generator.normal(size=1000).astype(np.float32)
    sent, wanted, state = np.zeros(1000), np.zeros(1000), ErrorFeedback.zero(1000)
    for _ in range(60):
        vector = direction + generator.normal(size=1000).astype(np.float32)
        data, state = state.encode(vector, codec, generator)
        sent += decode(data, codec, 1000)
        wanted += vector
    np.testing.assert_allclose(sent + state.residual, wanted, rtol=0, atol=2e-3)
    without = sum(decode(encode(direction, codec, generator), codec, 1000) for _ in range(60))
    assert np.linalg.norm(sent - wanted) < 0.5 * np.linalg.norm(without - 60 * direction)


def test_error_feedback_survives_its_bytes_and_refuses_damaged_ones() -> None:
    _, state = ErrorFeedback.zero(300).encode(update(300), "int2", rng())
    again = ErrorFeedback.from_bytes(state.to_bytes(), 300)
    assert (again.residual == state.residual).all()
    for data in (state.to_bytes()[:-1], state.to_bytes() + b"\0\0\0\0", b"\0\0\xc0\x7f" * 300):
        with pytest.raises(StorageError):
            ErrorFeedback.from_bytes(data, 300)
    with pytest.raises(UpdateError):
        state.encode(update(301), "int2", rng())


# --- refusals ---


@pytest.mark.parametrize(
    "vector",
    [
        pytest.param(np.zeros(0, np.float32), id="empty"),
        pytest.param(np.zeros((2, 2), np.float32), id="matrix"),
        pytest.param(np.zeros(4, np.float64), id="float64"),
        pytest.param(np.array([1, np.nan], np.float32), id="nan"),
        pytest.param(np.array([1, np.inf], np.float32), id="infinite"),
    ],
)
@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_vector_that_is_no_update_is_refused(codec: str, vector: Float32) -> None:
    with pytest.raises(UpdateError):
        encode(vector, codec, rng())


@pytest.mark.parametrize("codec", ["fp16", "int4", "int2", "sign", "dithered"])
def test_update_beyond_the_range_of_its_codec_is_refused(codec: str) -> None:
    with pytest.raises(UpdateError, match="too large"):
        encode(np.full(300, 1e30, np.float32), codec, rng())


def test_unknown_codec_is_refused_with_the_names_that_exist() -> None:
    for attempt in (lambda: encode(update(9), "gzip", rng()), lambda: decode(b"", "gzip", 9)):
        with pytest.raises(UpdateError) as caught:
            attempt()
        assert "dithered" in caught.value.hint


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_encoded_update_cut_or_longer_or_for_another_size_is_refused(codec: str) -> None:
    data = encode(update(600), codec, rng())
    for wrong in (*(data[:end] for end in range(len(data))), data + b"\0"):
        with pytest.raises(UpdateError):
            decode(wrong, codec, 600)
    for size in (0, -1, 599, 601, 2**26 + 1):
        with pytest.raises(UpdateError):
            decode(data, codec, size)
    for other in set(CODEC_NAMES) - {codec}:
        with pytest.raises(UpdateError):
            decode(data, other, 600)


@pytest.mark.parametrize("codec", CODEC_NAMES)
@given(st.data())
@settings(max_examples=40)
def test_damaged_update_gives_finite_values_or_our_error(codec: str, data: st.DataObject) -> None:
    encoded = bytearray(encode(update(600), codec, rng()))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(encoded) - 1))
        encoded[at] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(bytes(encoded), codec, 600)
    except ShoalError:
        return
    assert np.isfinite(decoded).all()


@given(st.sampled_from(CODEC_NAMES), st.booleans(), st.binary(max_size=200))
def test_any_bytes_give_finite_values_or_our_error(codec: str, deflated: bool, rest: bytes) -> None:
    header = struct.pack("<BBHI", CODEC_NAMES.index(codec) + 1, deflated, BLOCK, 9)
    try:
        decoded = decode(header + rest, codec, 9)
    except UpdateError:
        return
    assert np.isfinite(decoded).all()


def raw(codec: str, side: bytes, symbols: bytes, *, size: int = 8, deflate: bool = False) -> bytes:
    """An encoded update put together by hand."""
    number = {"int8": 3, "int4": 4, "int2": 5, "sign": 6, "dithered": 7}[codec]
    if deflate:
        deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
        symbols = deflater.compress(symbols) + deflater.flush()
    return struct.pack("<BBHI", number, int(deflate), BLOCK, size) + side + symbols


ONE = np.float16(1).tobytes()


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, -0.0])
@pytest.mark.parametrize("codec", ["int8", "int4", "int2", "sign"])
def test_scale_that_no_encoder_writes_is_refused(codec: str, scale: float) -> None:
    symbols = bytes({"int8": 8, "int4": 4, "int2": 2, "sign": 1}[codec])
    assert len(decode(raw(codec, ONE, symbols), codec, 8)) == 8
    with pytest.raises(UpdateError, match="scale"):
        decode(raw(codec, np.float16(scale).tobytes(), symbols), codec, 8)


@pytest.mark.parametrize(
    ("codec", "symbols"),
    [("int8", b"\x80" * 8), ("int4", b"\xf0" * 4), ("int4", b"\x0f" * 4), ("dithered", b"\xe1" * 4)],
)
def test_symbol_that_the_codec_does_not_have_is_refused(codec: str, symbols: bytes) -> None:
    side = bytes(8) + b"\xbf" if codec == "dithered" else ONE
    with pytest.raises(UpdateError, match="symbol"):
        decode(raw(codec, side, symbols), codec, 8)


@pytest.mark.parametrize("codec", DEFLATABLE)
def test_bomb_is_not_inflated(codec: str) -> None:
    side = bytes(9) if codec == "dithered" else ONE
    with pytest.raises(UpdateError, match="inflate"):
        decode(raw(codec, side, bytes(50_000_000), deflate=True), codec, 8)


def test_deflated_symbols_followed_by_others_are_refused() -> None:
    good = raw("int4", ONE, b"\x77" * 4, deflate=True)
    assert (decode(good, "int4", 8) == 0).all()
    for wrong in (good + b"\0", raw("int4", ONE, b"\x77" * 3, deflate=True), good[:-1]):
        with pytest.raises(UpdateError):
            decode(wrong, "int4", 8)


# --- dither ---


def test_noise_is_the_documented_stream_from_any_place() -> None:
    mask = 2**64 - 1

    def word(seed: int, index: int) -> int:
        z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return z ^ z >> 31

    seed = 0xFEDC_BA98_7654_3210
    expected = [((word(seed, n // 4) >> 16 * (n % 4) & 0xFFFF) - 32767.5) / 65536 for n in range(4000)]
    noise = dither(seed, 0, 4000)
    np.testing.assert_allclose(noise, expected, atol=1e-7)
    assert (dither(seed, 1000, 777) == noise[1000:1777]).all()
    some = np.array([0, 3, 9])
    assert (dither_blocks(seed, some, 256) == noise[:2560].reshape(-1, 256)[some]).all()
    assert np.abs(noise).max() < 0.5
    assert abs(noise.mean()) < 0.02


def test_step_codes_name_the_next_step_of_the_grid() -> None:
    steps = np.concatenate((STEPS, STEPS[1:-1] * np.float32(1.01), [1e-30])).astype(np.float32)
    codes = step_codes(steps)
    assert (STEPS[codes] >= steps).all()
    assert (codes[:256] == np.arange(256)).all()
    assert codes[-1] == 1
    with pytest.raises(UpdateError):
        step_codes(np.array([300.0], np.float32))
