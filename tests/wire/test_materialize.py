"""`materialize`: the bytes, worked out again one number at a time by a second implementation in plain Python."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.checkpoint import Checkpoint
from wire.errors import BundleError
from wire.manifest import FLOAT32, TEMPLATE, FileRef, Manifest, StateSizes, TaskSpec, TensorSlot
from wire.manifest_layout import (
    Float32Layer,
    Float32Layout,
    FloatTensor,
    Fold,
    Int8Layer,
    Int8Layout,
    Int8Range,
    LayerSource,
)
from wire.materialize import Activations, materialize_float32, materialize_int8

ROOT = Path(__file__).resolve().parents[2]
# A folded 3 × 2 layer, a transposed 2 × 3 layer without bias, and a table of floats.
FOLDED = LayerSource(
    name="folded",
    weight=0,
    shape=(3, 2),
    bias=6,
    fold=Fold(gamma=9, beta=12, mean=0, variance=3, epsilon=1e-5),
)
PLAIN = LayerSource(name="plain", weight=15, shape=(2, 3), transpose=True)
INT8_TEMPLATE = bytes(range(100))
FLOAT_TEMPLATE = bytes(range(120))
MANIFEST = Manifest(
    model="model",
    task=TaskSpec(kind="anomaly", loss="mse", metric="mse", higher_is_better=False),
    input_shape=(2,),
    output_name="reconstruction",
    params_size=25,
    buffers_size=6,
    opt_state_sizes=StateSizes(sgd=25, adam=51),
    params=(TensorSlot(name="all", shape=(25,), offset=0, size=25),),
    buffers=(TensorSlot(name="all", shape=(6,), offset=0, size=6),),
    ranges_count=2,
    int8=Int8Layout(
        weight_max=64,
        layers=(
            Int8Layer(source=FOLDED, weight_at=1, scale_at=8, bias_at=20, bias_scale_at=32, input_range=1),
            Int8Layer(source=PLAIN, weight_at=45, scale_at=52, input_range=0),
        ),
        ranges=(
            Int8Range(range=0, tensor="x", scale_at=61, zero_point_at=65),
            Int8Range(range=1, tensor="y", scale_at=66, zero_point_at=70),
        ),
        tensors=(FloatTensor(name="table", offset=21, shape=(2, 2), transpose=True, at=71),),
    ),
    float32=Float32Layout(
        layers=(Float32Layer(source=FOLDED, weight_at=0, bias_at=24),),
        tensors=(
            FloatTensor(name="plain", offset=15, shape=(2, 3), transpose=True, at=40),
            FloatTensor(name="mean", source="buffers", offset=0, shape=(3,), at=70),
            FloatTensor(name="table", offset=21, shape=(2, 2), at=84),
        ),
    ),
    files=(FileRef.of(TEMPLATE, INT8_TEMPLATE), FileRef.of(FLOAT32, FLOAT_TEMPLATE)),
    golden_inputs_shape=(1, 2),
    golden_outputs_shape=(2, 1, 2),
    tolerance=0.05,
)


def f32(value: float | Fraction) -> float:
    """Round to the nearest float32, ties to even: what one float32 operation does to its exact result."""
    exact = Fraction(value)
    if exact == 0:
        return 0.0
    exponent = max(math.frexp(float(exact))[1] - 24, -149)
    step = Fraction(2) ** exponent
    return float(round(exact / step) * step)


def f64(value: Fraction) -> float:
    return value.numerator / value.denominator


def by_hand(params: list[float], buffers: list[float], ranges: list[tuple[float, float]]) -> bytes:
    """The int8 file of MANIFEST, number by number, with exact fractions rounded where the format rounds."""
    out = bytearray(INT8_TEMPLATE)
    scales = []
    for low, high in ranges:
        low, high = min(low, 0.0), max(high, 0.0)
        width = f64(Fraction(high) - Fraction(low)) / 255
        scales.append(f32(width))
        struct.pack_into("<fB", out, (61, 66)[len(scales) - 1], scales[-1], round(-(low / width)))
    weights, biases = [], []
    for c in range(3):
        root = f32(math.sqrt(f32(Fraction(buffers[3 + c]) + Fraction(f32(1e-5)))))
        factor = f32(Fraction(params[9 + c]) / Fraction(root))
        weights.append([f32(Fraction(params[2 * c + i]) * Fraction(factor)) for i in range(2)])
        centred = f32(Fraction(params[6 + c]) - Fraction(buffers[c]))
        biases.append(f32(Fraction(f32(Fraction(centred) * Fraction(factor))) + Fraction(params[12 + c])))
    rows = [params[15 + 3 * c : 18 + 3 * c] for c in range(2)]
    for at, scale_at, layer in ((1, 8, weights), (45, 52, rows)):
        steps = [f32(max(map(abs, row)) * 2 / 128) for row in layer]
        quantized = [
            [round(f32(Fraction(w) / Fraction(s))) for w in row] for row, s in zip(layer, steps, strict=True)
        ]
        flat = quantized if layer is weights else list(zip(*quantized, strict=True))
        struct.pack_into("6b", out, at, *[q for row in flat for q in row])
        struct.pack_into(f"<{len(steps)}f", out, scale_at, *steps)
        if layer is weights:
            bias_steps = [f32(Fraction(scales[1]) * Fraction(s)) for s in steps]
            quotients = [round(b / s) for b, s in zip(biases, bias_steps, strict=True)]
            struct.pack_into("<3i3f", out, 20, *quotients, *bias_steps)
    table = params[21:25]
    struct.pack_into("<4f", out, 71, table[0], table[2], table[1], table[3])
    return bytes(out)


def make_checkpoint(seed: int) -> Checkpoint:
    rng = np.random.default_rng(seed)
    params = rng.normal(size=25).astype(np.float32)
    buffers = np.concatenate([rng.normal(size=3), rng.uniform(0.2, 2.0, 3)]).astype(np.float32)
    ranges = np.sort(rng.normal(size=(2, 2)).astype(np.float32), axis=1)
    return Checkpoint(params, buffers, ranges)


@given(st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_int8_bytes_are_those_of_exact_arithmetic(seed: int) -> None:
    checkpoint = make_checkpoint(seed)
    values = (checkpoint.params.tolist(), checkpoint.buffers.tolist())
    ranges = [(low, high) for low, high in checkpoint.ranges.tolist()]
    assert materialize_int8(INT8_TEMPLATE, MANIFEST, checkpoint) == by_hand(*values, ranges)


def test_vector_of_the_int8_file() -> None:
    params = [((37 * i) % 50 - 25) / 16 for i in range(25)]
    buffers = [0.5, -0.25, 0.0, 1.0, 0.5, 2.0]
    ranges = [(-1.5, 2.0), (0.0, 3.25)]
    checkpoint = Checkpoint(*(np.array(values, np.float32) for values in (params, buffers, ranges)))
    result = materialize_int8(INT8_TEMPLATE, MANIFEST, checkpoint)
    assert result == by_hand(params, buffers, ranges)
    assert hashlib.sha256(result).hexdigest() == (
        "daced85f265df2e4a27716fc889d8ae79a711c33ee4fe9354c677536d90d4e48"
    )


def test_float32_file_holds_the_folded_layer_and_the_tensors() -> None:
    checkpoint = make_checkpoint(3)
    params, buffers = checkpoint.params, checkpoint.buffers
    out = materialize_float32(FLOAT_TEMPLATE, MANIFEST, checkpoint)
    factor = params[9:12] / np.sqrt(buffers[3:6] + np.float32(1e-5))
    np.testing.assert_array_equal(
        np.frombuffer(out, "<f4", 6).reshape(3, 2), params[:6].reshape(3, 2) * factor[:, None]
    )
    bias = (params[6:9] - buffers[:3]) * factor + params[12:15]
    np.testing.assert_array_equal(np.frombuffer(out, "<f4", 3, 24), bias)
    np.testing.assert_array_equal(
        np.frombuffer(out, "<f4", 6, 40).reshape(3, 2), params[15:21].reshape(2, 3).T
    )
    np.testing.assert_array_equal(np.frombuffer(out, "<f4", 3, 70), buffers[:3])
    np.testing.assert_array_equal(np.frombuffer(out, "<f4", 4, 84), params[21:25])
    untouched = [*range(36, 40), *range(64, 70), *range(82, 84), *range(100, 120)]
    assert [out[at] for at in untouched] == [FLOAT_TEMPLATE[at] for at in untouched]


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0.0, 0.0, 1.0, 0),
        (0.0, 255.0, 1.0, 0),
        (-255.0, -1.0, 1.0, 255),
        (3.0, 510.0, 2.0, 0),
        (-128.0, 127.0, 1.0, 128),
        (0.0, 1e-44, 1.0, 0),
        (-3e38, 3e38, 3e38 / 255 * 2, 128),
    ],
)
def test_activation_range_holds_zero(low: float, high: float, scale: float, zero_point: int) -> None:
    found = Activations.of(np.array([[low, high]], np.float32))
    assert found.scale.tolist() == [pytest.approx(scale, rel=1e-6)]
    assert found.zero_point.tolist() == [zero_point]


def test_channel_of_zeros_has_the_scale_one() -> None:
    params = make_checkpoint(0).params.copy()
    params[15:18] = 0.0
    checkpoint = Checkpoint(params, make_checkpoint(0).buffers, make_checkpoint(0).ranges)
    out = materialize_int8(INT8_TEMPLATE, MANIFEST, checkpoint)
    assert struct.unpack_from("<f", out, 52) == (1.0,)
    assert [out[45], out[47], out[49]] == [0, 0, 0]


def test_weight_scale_is_widened_where_the_bias_would_not_fit() -> None:
    params = make_checkpoint(0).params.copy()
    params[:6] *= np.float32(1e-6)
    params[12:15] = np.float32(1e4)
    checkpoint = Checkpoint(params, make_checkpoint(0).buffers, make_checkpoint(0).ranges)
    out = materialize_int8(INT8_TEMPLATE, MANIFEST, checkpoint)
    quantized = struct.unpack_from("<3i", out, 20)
    scales = struct.unpack_from("<3f", out, 32)
    for q, scale in zip(quantized, scales, strict=True):
        assert 2**30 < q < 2**31 - 1
        assert q * scale == pytest.approx(1e4, rel=1e-3)


@pytest.mark.parametrize("variance", [-1.0, -1e-5])
def test_variance_below_zero_is_refused(variance: float) -> None:
    good = make_checkpoint(0)
    buffers = good.buffers.copy()
    buffers[4] = variance
    checkpoint = Checkpoint(good.params, buffers, good.ranges)
    for template, materialize in ((INT8_TEMPLATE, materialize_int8), (FLOAT_TEMPLATE, materialize_float32)):
        with pytest.raises(BundleError, match="cannot be folded"):
            materialize(template, MANIFEST, checkpoint)


def test_extreme_params_give_a_file_or_our_error() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        exponents = rng.integers(-44, 38, 25)
        params = (rng.normal(size=25) * 10.0**exponents).clip(-3e38, 3e38).astype(np.float32)
        checkpoint = Checkpoint(params, make_checkpoint(seed).buffers, make_checkpoint(seed).ranges)
        try:
            out = materialize_int8(INT8_TEMPLATE, MANIFEST, checkpoint)
        except BundleError:
            continue
        assert len(out) == len(INT8_TEMPLATE)
        assert np.isfinite(np.frombuffer(out, "<f4", 3, 8)).all()


def test_another_template_or_checkpoint_is_refused() -> None:
    good = make_checkpoint(0)
    with pytest.raises(BundleError, match="not the file"):
        materialize_int8(INT8_TEMPLATE[:-1] + b"\0", MANIFEST, good)
    with pytest.raises(BundleError, match="not the file"):
        materialize_float32(INT8_TEMPLATE, MANIFEST, good)
    for other in (
        Checkpoint(good.params[:-1], good.buffers, good.ranges),
        Checkpoint(good.params, good.buffers[:-1], good.ranges),
        Checkpoint(good.params, good.buffers, good.ranges[:-1]),
    ):
        with pytest.raises(BundleError) as caught:
            materialize_int8(INT8_TEMPLATE, MANIFEST, other)
        assert caught.value.facts["wanted"] == (25, 6, 2)
        assert "another model" in caught.value.hint


def test_other_processor_features_give_the_same_bytes(tmp_path: Path) -> None:
    """The device's numpy may have other SIMD paths than the cloud's."""
    rng = np.random.default_rng(11)
    shape = (61, 37)
    size = shape[0] * shape[1]
    source = LayerSource(name="big", weight=0, shape=shape, bias=size)
    template = bytes(size + 4 * 61 * 3 + 5)
    at = size
    layout = Int8Layout(
        weight_max=64,
        layers=(
            Int8Layer(
                source=source,
                weight_at=0,
                scale_at=at,
                bias_at=at + 244,
                bias_scale_at=at + 488,
                input_range=0,
            ),
        ),
        ranges=(Int8Range(range=0, tensor="x", scale_at=at + 732, zero_point_at=at + 736),),
    )
    big = msgspec.structs.replace(
        MANIFEST,
        params_size=size + 61,
        buffers_size=0,
        params=(TensorSlot(name="all", shape=(size + 61,), offset=0, size=size + 61),),
        buffers=(),
        ranges_count=1,
        int8=layout,
        float32=Float32Layout(layers=()),
        files=(FileRef.of(TEMPLATE, template), FileRef.of(FLOAT32, b"")),
    )
    params = rng.normal(size=size + 61).astype(np.float32)
    checkpoint = Checkpoint(params, np.zeros(0, np.float32), np.array([[-1.3, 2.7]], np.float32))
    (tmp_path / "manifest").write_bytes(big.to_bytes())
    (tmp_path / "checkpoint").write_bytes(checkpoint.to_bytes())
    (tmp_path / "template").write_bytes(template)
    wanted = hashlib.sha256(materialize_int8(template, big, checkpoint)).hexdigest()
    program = (
        "import hashlib; from pathlib import Path; from wire.manifest import Manifest\n"
        "from wire.checkpoint import Checkpoint; from wire.materialize import materialize_int8\n"
        "m, c, t = (Path(n).read_bytes() for n in ('manifest', 'checkpoint', 'template'))\n"
        "made = materialize_int8(t, Manifest.from_bytes(m), Checkpoint.from_bytes(c))\n"
        "print(hashlib.sha256(made).hexdigest())\n"
    )
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    enabled = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NPY_DISABLE_CPU_FEATURES": " ".join(enabled)}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == wanted
