"""Update codecs: a float32 vector to few bytes and back, fast enough to fold a fleet.

    encoded = codec(1) || flags(1) || block(2) || size(4) || codec's own part      (little-endian)

    fp32      float32 values                          fp16    float16 values
    int8      scales, one signed byte a value         int4    scales, q + 7 in one half byte a value
    int2      scales, four levels                     sign    scales, one bit a value
    dithered  seed(8), scale codes, pairs of q in −7…7 as one byte 15·(q₀ + 7) + q₁ + 7

Values come in blocks of 256 with one scale each (float16, or for `dithered` one byte: an eighth of an
octave). The symbols of the quantized codecs are deflated (Huffman coding only) when that is shorter (flag
1).

int8, int4: stochastic rounding, unbiased. int2, sign: deterministic, biased, for error feedback. dithered:
uniform quantization with subtractive dither that both sides draw from `seed`: unbiased, error independent
of the value and uniform with variance step²/12, half of what stochastic rounding costs; Huffman coding of
pairs comes within 2 % of the entropy of its symbols, and the encoder takes the finest step that keeps to
`DITHER_BUDGET_BITS`.

Laws of the file: pure, the generator is an argument; exact lengths; scales finite; nothing is inflated
beyond what `params_size` asks for; what decodes is finite. Sources: QSGD (Alistarh et al. 2017), error
feedback (Karimireddy et al. 2019), subtractive dither (Roberts 1962; UVeQFed, Shlezinger et al. 2021),
docs/protocol.md, clause 8.
"""

from __future__ import annotations

import builtins
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from wire.dither import STEPS, dither, dither_blocks, step_codes
from wire.errors import StorageError, UpdateError
from wire.messages import CODEC_NAMES, MAX_PARAMS

Float32: TypeAlias = NDArray[np.float32]
_Bytes: TypeAlias = NDArray[np.uint8]

BLOCK: Final = 256
DITHER_STEPS: Final = tuple(0.5 * 2 ** (eighth / 8) for eighth in range(17))
"""Quantization steps that `dithered` chooses from, in units of a block's root mean square: 0.5 to 2."""
DITHER_BUDGET_BITS: Final = 1.7
"""Encoded bits a value that `dithered` keeps to: 5.3 % of float32."""
FEEDBACK_CODECS: Final = frozenset({"int2", "sign"})
"""Biased codecs: without error feedback, training drifts."""

_HEADER: Final = struct.Struct("<BBHI")
_NUMBERS: Final[dict[str, int]] = {
    "fp32": 1, "fp16": 2, "int8": 3, "int4": 4, "int2": 5, "sign": 6, "dithered": 7,
}  # fmt: skip
_DEFLATED: Final = 1
_PER_BYTE: Final[dict[str, int]] = {"int8": 1, "int4": 2, "int2": 4, "sign": 8, "dithered": 2}
_SEED_BYTES: Final = 8
# 131,072 values tell well enough how a whole update will compress.
_SAMPLE_BLOCKS: Final = 512
# Work goes tile by tile, so that its scratch memory stays in the cache.
_TILE: Final = 65_536
_MAX_FLOAT16: Final = 65_504.0
# The step of four levels that is best for a normal distribution (Max 1960).
_INT2_STEP: Final = 0.9957


class Randomness(Protocol):
    """Where random bytes come from: numpy's `Generator`, or anything lighter that follows from a seed."""

    def bytes(self, length: int, /) -> builtins.bytes: ...


def encode(vector: Float32, codec: str, rng: Randomness, *, budget_bits: float = DITHER_BUDGET_BITS) -> bytes:
    """Encodes float32 [P].

    Args:
        rng: draws the rounding of int8 and int4 and the seed of `dithered`; the others do not touch it.
        budget_bits: for `dithered`: the finest of `DITHER_STEPS` that needs no more bits a value is taken,
            or the coarsest (for a large update a sample of its blocks decides).

    Raises:
        UpdateError: (us) not a float32 vector of 1 to 2²⁶ finite values, or values too large for the codec.
    """
    _check_vector(vector, codec)
    header = (_NUMBERS[codec], len(vector))
    if codec == "fp32":
        return _join(header, 0, vector.astype("<f4", copy=False).tobytes())
    if codec == "fp16":
        if np.abs(vector).max() > _MAX_FLOAT16:
            raise UpdateError("update is too large for fp16", codec=codec)
        return _join(header, 0, vector.astype("<f2").tobytes())
    if codec == "dithered":
        return _encode_dithered(vector, header, rng, budget_bits)
    blocks = _in_blocks(vector)
    side, packed = _quantize(blocks, codec, rng)
    return _smaller(header, side, packed[: _packed_bytes(codec, len(vector))].tobytes())


def decode(data: bytes, codec: str, params_size: int) -> Float32:
    """Decodes to float32 [params_size].

    Raises:
        UpdateError: (peer) another codec or size than announced, a wrong length, a scale or value that is
            not finite, or a symbol that the codec does not have.
    """
    parsed = _parse(data, codec, params_size)
    out = np.empty(params_size, np.float32)
    for start, values in _tiles(parsed):
        out[start : start + len(values)] = values
    return out


def decode_into(out: NDArray[np.floating], data: bytes, codec: str, *, weight: float) -> None:
    """Adds `weight` × decoded to `out` (float32 or float64 [P]) without a vector in between.

    An update that does not decode may have been added in part: fold only what `decode` or a dry run
    accepted, or into an accumulator that is thrown away.

    Raises:
        UpdateError: (peer) as `decode`.
    """
    for start, values in _tiles(_parse(data, codec, len(out))):
        values *= np.float32(weight)
        out[start : start + len(values)] += values


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What lossy coding has left out so far, float32 [P]; it is added to the next update.

    A value: the owner stores the successor in the transaction that stores the encoded update, so that a
    crash neither loses nor repeats what was left out. It never leaves the device.
    """

    residual: Float32

    @classmethod
    def zero(cls, params_size: int) -> ErrorFeedback:
        return cls(np.zeros(params_size, np.float32))

    def encode(self, vector: Float32, codec: str, rng: Randomness) -> tuple[bytes, ErrorFeedback]:
        """Encodes `vector` + residual; returns the bytes and the state for the next update.

        Raises:
            UpdateError: (us) the sizes differ, or as `encode`.
        """
        if vector.shape != self.residual.shape:
            raise UpdateError("error feedback has another size than the update", size=len(self.residual))
        wanted = vector + self.residual
        data = encode(wanted, codec, rng)
        return data, ErrorFeedback(wanted - decode(data, codec, len(wanted)))

    def to_bytes(self) -> bytes:
        """Little-endian float32."""
        return self.residual.astype("<f4", copy=False).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, params_size: int) -> ErrorFeedback:
        """Reads `to_bytes`.

        Raises:
            StorageError: (disk) another length, or values that are not finite.
        """
        if len(data) != 4 * params_size:
            raise StorageError(
                "stored residual has another size", size_bytes=len(data), expected=4 * params_size
            )
        residual = np.frombuffer(data, "<f4").astype(np.float32)
        if not np.isfinite(residual).all():
            raise StorageError("stored residual is not finite")
        return cls(residual)


# --- encoding ---


def _check_vector(vector: Float32, codec: str) -> None:
    if codec not in _NUMBERS:
        raise UpdateError(f"no codec {codec!r}", hint=f"one of {', '.join(CODEC_NAMES)}")
    if vector.ndim != 1 or vector.dtype != np.float32 or not 1 <= len(vector) <= MAX_PARAMS:
        raise UpdateError("update is not a float32 vector", shape=vector.shape, dtype=str(vector.dtype))
    if not np.isfinite(vector).all():
        raise UpdateError("update holds a value that is not finite")


def _join(header: tuple[int, int], flags: int, *parts: bytes) -> bytes:
    number, size = header
    return b"".join((_HEADER.pack(number, flags, BLOCK, size), *parts))


def _smaller(header: tuple[int, int], side: bytes, packed: bytes) -> bytes:
    """Side information and symbols, deflated if that is shorter."""
    deflated = _deflate(packed)
    if len(deflated) < len(packed):
        return _join(header, _DEFLATED, side, deflated)
    return _join(header, 0, side, packed)


def _deflate(packed: bytes) -> bytes:
    """Huffman coding without matching: symbols of an update repeat by chance only."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return deflater.compress(packed) + deflater.flush()


def _packed_bytes(codec: str, size: int) -> int:
    return -(-size // _PER_BYTE[codec])


def _in_blocks(vector: Float32) -> Float32:
    """float32 [blocks, 256], the last block filled up with zeros."""
    missing = -len(vector) % BLOCK
    return (np.pad(vector, (0, missing)) if missing else vector).reshape(-1, BLOCK)


def _quantize(blocks: Float32, codec: str, rng: Randomness) -> tuple[bytes, _Bytes]:
    """Returns float16 scales and packed symbols."""
    largest = np.abs(blocks).max(axis=1)
    if codec in ("int8", "int4"):
        levels = 127 if codec == "int8" else 7
        side, scales = _float16_scales(largest / levels)
        noise = (np.frombuffer(rng.bytes(4 * blocks.size), "<u4") >> 8).astype(np.float32)
        noise = noise.reshape(blocks.shape) * np.float32(2**-24)
        symbols = np.clip(np.floor(blocks / scales + noise), -levels, levels)
        if codec == "int8":
            return side, symbols.astype(np.int8).ravel().view(np.uint8)
        half = (symbols + 7).astype(np.uint8).reshape(-1, 2)
        return side, half[:, 0] | half[:, 1] << 4
    if codec == "int2":
        side, scales = _float16_scales(_INT2_STEP * _root_mean_square(blocks))
        quarter = (np.clip(np.floor(blocks / scales), -2, 1) + 2).astype(np.uint8).reshape(-1, 4)
        return side, quarter[:, 0] | quarter[:, 1] << 2 | quarter[:, 2] << 4 | quarter[:, 3] << 6
    side, _ = _float16_scales(np.abs(blocks).mean(axis=1))
    return side, np.packbits(blocks.ravel() < 0, bitorder="little")


def _root_mean_square(blocks: Float32) -> Float32:
    """By way of float64: the squares of a large update overflow float32."""
    return cast(Float32, np.sqrt(np.square(blocks, dtype=np.float64).mean(axis=1)).astype(np.float32))


def _float16_scales(scales: Float32) -> tuple[bytes, Float32]:
    """Rounds scales up to float16, so that no symbol leaves its range; returns their bytes and float32
    [blocks, 1].

    A block of zeros has the scale 0 on the wire, and 1 here, so that it can be divided by.
    """
    if scales.max() > _MAX_FLOAT16:
        raise UpdateError("update is too large for its codec", largest=float(scales.max()))
    rounded = scales.astype("<f2")
    low = rounded.astype(np.float32) < scales
    rounded[low] = np.nextafter(rounded[low], np.float16(np.inf), dtype=np.float16)
    divisors = rounded.astype(np.float32)
    divisors[divisors == 0] = 1.0
    return rounded.tobytes(), divisors[:, None]


def _encode_dithered(vector: Float32, header: tuple[int, int], rng: Randomness, budget_bits: float) -> bytes:
    seed = int.from_bytes(rng.bytes(_SEED_BYTES), "little")
    step = _dither_step(vector, seed, budget_bits)
    codes, packed = [], []
    for start in range(0, len(vector), _TILE):
        blocks = _in_blocks(vector[start : start + _TILE])
        noise = dither(seed, start, blocks.size).reshape(blocks.shape)
        tile_codes, tile_packed = _Dithering(blocks, noise).quantize(step)
        codes.append(tile_codes.tobytes())
        packed.append(tile_packed.tobytes())
    side = b"".join((seed.to_bytes(_SEED_BYTES, "little"), *codes))
    return _smaller(header, side, b"".join(packed)[: _packed_bytes("dithered", header[1])])


def _dither_step(vector: Float32, seed: int, budget_bits: float) -> float:
    """The finest of `DITHER_STEPS` that keeps to the budget on a sample of the blocks, or the coarsest."""
    count = -(-len(vector) // BLOCK)
    chosen = np.arange(0, count, -(-count // _SAMPLE_BLOCKS))
    blocks = np.concatenate([_in_blocks(vector[index * BLOCK : (index + 1) * BLOCK]) for index in chosen])
    sample = _Dithering(blocks, dither_blocks(seed, chosen, BLOCK))

    def fits(step: float) -> bool:
        codes, packed = sample.quantize(step)
        return 8 * (len(codes) + len(_deflate(packed.tobytes()))) <= budget_bits * sample.blocks.size

    index = bisect_left(DITHER_STEPS, True, key=fits)
    return DITHER_STEPS[min(index, len(DITHER_STEPS) - 1)]


class _Dithering:
    """Blocks and their noise, to be quantized with one step after the other until the bytes suit."""

    def __init__(self, blocks: Float32, noise: Float32) -> None:
        self.blocks, self._noise = blocks, noise
        self._largest, self._rms = np.abs(blocks).max(axis=1), _root_mean_square(blocks)

    def quantize(self, step: float) -> tuple[_Bytes, _Bytes]:
        """Returns scale codes and pairs of symbols."""
        # No value is further than 7 steps from zero, so none is clipped.
        codes = step_codes(np.maximum(np.float32(step) * self._rms, self._largest / 7))
        scales = STEPS[codes][:, None]
        symbols = self.blocks / np.where(scales > 0, scales, 1)
        symbols += self._noise
        np.rint(symbols, out=symbols)
        np.clip(symbols, -7, 7, out=symbols)
        symbols += 7
        pairs = symbols.astype(np.uint8).reshape(-1, 2)
        return codes, 15 * pairs[:, 0] + pairs[:, 1]


# --- decoding ---


@dataclass(frozen=True, slots=True)
class _Parsed:
    """An encoded update whose lengths are right and whose scales are finite."""

    codec: str
    size: int
    scales: Float32
    symbols: memoryview
    seed: int = 0


def _parse(data: bytes, codec: str, params_size: int) -> _Parsed:
    if codec not in _NUMBERS:
        raise UpdateError(f"no codec {codec!r}", hint=f"one of {', '.join(CODEC_NAMES)}")
    if not 1 <= params_size <= MAX_PARAMS:
        raise UpdateError("no such number of parameters", params_size=params_size)
    if len(data) < _HEADER.size:
        raise UpdateError("encoded update is too short", size_bytes=len(data))
    number, flags, block, size = _HEADER.unpack_from(data)
    if number != _NUMBERS[codec] or block != BLOCK or size != params_size:
        raise UpdateError("encoded update is not what was announced", codec=codec, params_size=size)
    if flags != 0 and (flags != _DEFLATED or codec not in _PER_BYTE):
        raise UpdateError("encoded update has unknown flags", flags=flags)
    rest = memoryview(data)[_HEADER.size :]
    if codec in ("fp32", "fp16"):
        _check_length(rest, size * (4 if codec == "fp32" else 2))
        return _Parsed(codec, size, np.empty(0, np.float32), rest)
    blocks = -(-size // BLOCK)
    side_bytes = _SEED_BYTES + blocks if codec == "dithered" else 2 * blocks
    if len(rest) < side_bytes:
        raise UpdateError("encoded update is too short", size_bytes=len(data))
    side, symbols = rest[:side_bytes], rest[side_bytes:]
    expected = _packed_bytes(codec, size)
    if flags == _DEFLATED:
        symbols = _inflate(symbols, expected)
    _check_length(symbols, expected)
    if codec == "dithered":
        scales = STEPS[np.frombuffer(side[_SEED_BYTES:], np.uint8)]
        return _Parsed(codec, size, scales, symbols, int.from_bytes(side[:_SEED_BYTES], "little"))
    scales = np.frombuffer(side, "<f2").astype(np.float32)
    if not np.isfinite(scales).all() or np.signbit(scales).any():
        raise UpdateError("encoded update has a scale that is not finite or below zero")
    return _Parsed(codec, size, scales, symbols)


def _check_length(data: memoryview, expected: int) -> None:
    if len(data) != expected:
        raise UpdateError("encoded update has a wrong length", size_bytes=len(data), expected=expected)


def _inflate(deflated: memoryview, expected: int) -> memoryview:
    """Inflates at most one byte more than `expected`."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        symbols = inflater.decompress(deflated, expected + 1)
    except zlib.error as error:
        raise UpdateError("encoded update does not inflate") from error
    if not inflater.eof or inflater.unused_data:
        raise UpdateError("encoded update does not inflate to its length", expected=expected)
    return memoryview(symbols)


def _tiles(parsed: _Parsed) -> Iterator[tuple[int, Float32]]:
    """Yields (start, float32 values) of one tile after the other; the caller may overwrite the values."""
    per_byte = _PER_BYTE.get(parsed.codec, 1)
    for start in range(0, parsed.size, _TILE):
        count = min(_TILE, parsed.size - start)
        if parsed.codec in ("fp32", "fp16"):
            yield start, _plain_tile(parsed, start, count)
            continue
        packed = np.frombuffer(parsed.symbols, np.uint8)[start // per_byte : -(-(start + count) // per_byte)]
        values = _symbol_values(parsed.codec, packed)
        if parsed.codec == "dithered":
            values -= dither(parsed.seed, start, len(values))
        scales = parsed.scales[start // BLOCK : -(-(start + count) // BLOCK)]
        whole = count // BLOCK * BLOCK
        values[:whole].reshape(-1, BLOCK)[...] *= scales[: whole // BLOCK, None]
        values[whole:] *= scales[-1]
        yield start, values[:count]


def _plain_tile(parsed: _Parsed, start: int, count: int) -> Float32:
    kind = "<f4" if parsed.codec == "fp32" else "<f2"
    values = np.frombuffer(parsed.symbols, kind, count, start * np.dtype(kind).itemsize).astype(np.float32)
    if not np.isfinite(values).all():
        raise UpdateError("encoded update holds a value that is not finite")
    return values


def _symbol_values(codec: str, packed: _Bytes) -> Float32:
    """Symbols to the numbers that scales multiply, by a table with a row for every byte."""
    if codec == "int8":
        values = packed.view(np.int8).astype(np.float32)
        valid = bool(packed.size == 0 or values.min() >= -127)
    else:
        values = _TABLES[codec].take(packed, axis=0).reshape(-1).view(np.float32)
        valid = codec not in _INVALID or not _INVALID[codec].take(packed).any()
    if not valid:
        raise UpdateError("encoded update holds a symbol that its codec does not have")
    return values


def _table(per_byte: int, bits: int, values: Float32) -> Float32:
    """float32 [256, per_byte]: the values of the symbols of `bits` bits in every byte, lowest first."""
    byte = np.arange(256)[:, None] >> bits * np.arange(per_byte)
    return cast(Float32, values[byte & (1 << bits) - 1])


_INT4: Final = _table(2, 4, np.arange(-7, 9, dtype=np.float32))
_DITHERED: Final = (np.stack(np.divmod(np.arange(256), 15), axis=1) - 7).astype(np.float32)
# A row of two or four float32 is looked up as one machine word, which is several times faster.
_TABLES: Final[dict[str, NDArray[np.generic]]] = {
    "int4": _INT4.view(np.uint64),
    "int2": _table(4, 2, np.array([-1.5, -0.5, 0.5, 1.5], np.float32)).view(np.complex128),
    "sign": _table(8, 1, np.array([1.0, -1.0], np.float32)),
    "dithered": _DITHERED.view(np.uint64),
}
_INVALID: Final[dict[str, NDArray[np.bool_]]] = {
    "int4": np.asarray((_INT4 > 7).any(axis=1)),
    "dithered": np.asarray((_DITHERED > 7).any(axis=1)),
}
