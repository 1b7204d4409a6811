"""Manifests and releases: canonical JSON in and out, every part in bounds and in agreement with the others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.errors import BundleError
from wire.manifest import FLOAT32, TEMPLATE, FileRef, Manifest, Release, StateSizes, TaskSpec, TensorSlot
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

# One layer 2 → 3 with a folded BatchNorm, and one tensor that stays float32.
SOURCE = LayerSource(
    name="layer",
    weight=0,
    shape=(3, 2),
    bias=6,
    fold=Fold(gamma=9, beta=12, mean=0, variance=3, epsilon=1e-5),
)
MANIFEST = Manifest(
    model="model",
    task=TaskSpec(
        kind="classification",
        loss="cross_entropy",
        metric="accuracy",
        higher_is_better=True,
        classes=2,
        labels=("no", "yes"),
    ),
    input_shape=(2,),
    output_name="logits",
    params_size=19,
    buffers_size=6,
    opt_state_sizes=StateSizes(sgd=19, adam=39),
    params=tuple(
        TensorSlot(name=name, shape=shape, offset=offset, size=size)
        for name, shape, offset, size in (
            ("weight", (3, 2), 0, 6),
            ("bias", (3,), 6, 3),
            ("gamma", (3,), 9, 3),
            ("beta", (3,), 12, 3),
            ("scale", (2, 2), 15, 4),
        )
    ),
    buffers=(
        TensorSlot(name="mean", shape=(3,), offset=0, size=3),
        TensorSlot(name="variance", shape=(3,), offset=3, size=3),
    ),
    ranges_count=1,
    int8=Int8Layout(
        weight_max=64,
        layers=(
            Int8Layer(source=SOURCE, weight_at=10, scale_at=20, bias_at=32, bias_scale_at=44, input_range=0),
        ),
        ranges=(Int8Range(range=0, tensor="x", scale_at=60, zero_point_at=64),),
        tensors=(FloatTensor(name="scale", offset=15, shape=(2, 2), at=70),),
    ),
    float32=Float32Layout(
        layers=(Float32Layer(source=SOURCE, weight_at=0, bias_at=24),),
        tensors=(FloatTensor(name="scale", offset=15, shape=(2, 2), transpose=True, at=36),),
    ),
    files=(FileRef.of(TEMPLATE, bytes(90)), FileRef.of(FLOAT32, bytes(52))),
    golden_inputs_shape=(4, 2),
    golden_outputs_shape=(2, 4, 2),
    tolerance=0.05,
)
RELEASE = Release(
    version=3,
    graphs_sha256=MANIFEST.graphs_sha256,
    checkpoint_sha256="ab" * 32,
    int8_sha256="cd" * 32,
    float32_sha256="ef" * 32,
    golden_inputs=FileRef.of("golden_inputs.bin", b"in"),
    golden_outputs=FileRef.of("golden_outputs.bin", b"out"),
    metrics={"accuracy_int8": 0.5},
    created=1.5,
)


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    plain = json.loads(MANIFEST.to_bytes())
    change(plain)
    return canonical(plain)


def test_manifest_round_trips_and_is_named_by_its_bytes() -> None:
    data = MANIFEST.to_bytes()
    assert Manifest.from_bytes(data) == MANIFEST
    assert data == canonical(json.loads(data))
    assert MANIFEST.graphs_sha256 == hashlib.sha256(data).hexdigest()


def test_release_round_trips() -> None:
    assert Release.from_bytes(RELEASE.to_bytes()) == RELEASE


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "unknown key": lambda m: m.update(extra=1),
    "unknown nested key": lambda m: m["task"].update(extra=1),
    "missing key": lambda m: m.pop("params"),
    "format": lambda m: m.update(format=2),
    "name": lambda m: m.update(model="a/b"),
    "shape": lambda m: m.update(input_shape=[0]),
    "shape type": lambda m: m.update(input_shape=["2"]),
    "rank": lambda m: m.update(input_shape=[1] * 9),
    "size": lambda m: m.update(params_size=2**27),
    "tolerance": lambda m: m.update(tolerance=0.0),
    "kind": lambda m: m["task"].update(kind="regression"),
    "labels": lambda m: m["task"].update(labels=["one"]),
    "classes of an anomaly": lambda m: m["task"].update(kind="anomaly"),
    "slot gap": lambda m: m["params"][1].update(offset=7),
    "slot size": lambda m: m["params"][0].update(size=7),
    "slot twice": lambda m: m["params"][1].update(name="weight"),
    "slots short": lambda m: m.update(params_size=20),
    "buffers short": lambda m: m.update(buffers_size=7),
    "file name": lambda m: m["files"][0].update(name="../x"),
    "file hash": lambda m: m["files"][0].update(sha256="AB" * 32),
    "file twice": lambda m: m["files"].append(m["files"][0]),
    "file missing": lambda m: m["files"].pop(),
    "golden inputs": lambda m: m.update(golden_inputs_shape=[4, 3]),
    "golden outputs": lambda m: m.update(golden_outputs_shape=[1, 4, 2]),
    "golden count": lambda m: m.update(golden_outputs_shape=[2, 5, 2]),
    "range unused": lambda m: m.update(ranges_count=2),
    "range unknown": lambda m: m["int8"]["layers"][0].update(input_range=1),
    "range twice": lambda m: m["int8"]["ranges"].append(dict(m["int8"]["ranges"][0], scale_at=50)),
    "patch overlap": lambda m: m["int8"]["ranges"][0].update(scale_at=43),
    "patch past the end": lambda m: m["int8"]["tensors"][0].update(at=75),
    "float patch past the end": lambda m: m["float32"]["tensors"][0].update(at=37),
    "float patch overlap": lambda m: m["float32"]["layers"][0].update(bias_at=23),
    "source past the end": lambda m: m["int8"]["layers"][0]["source"].update(weight=14),
    "bias past the end": lambda m: m["int8"]["layers"][0]["source"].update(bias=17),
    "gamma past the end": lambda m: m["float32"]["layers"][0]["source"]["fold"].update(gamma=17),
    "variance past the end": lambda m: m["float32"]["layers"][0]["source"]["fold"].update(variance=4),
    "tensor past the end": lambda m: m["int8"]["tensors"][0].update(offset=16),
    "tensor of buffers": lambda m: m["int8"]["tensors"][0].update(source="buffers"),
    "half a bias": lambda m: m["int8"]["layers"][0].update(bias_at=None),
    "no place for the bias": lambda m: m["float32"]["layers"][0].update(bias_at=None),
    "transpose": lambda m: m["int8"]["layers"][0]["source"].update(shape=[3, 2, 1], transpose=True),
    "epsilon": lambda m: m["int8"]["layers"][0]["source"]["fold"].update(epsilon=0.0),
    "weight_max": lambda m: m["int8"].update(weight_max=128),
    "newline in the model": lambda m: m.update(model="model\n"),
    "newline in a file": lambda m: m["files"][0].update(name="template.onnx\n"),
    "newline in a hash": lambda m: m["files"][0].update(sha256="ab" * 32 + "\n"),
    "huge product": lambda m: m["int8"]["layers"][0]["source"].update(shape=[2**26] * 8),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_manifest_that_does_not_fit_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    data = changed(change)
    assert data != MANIFEST.to_bytes()
    with pytest.raises(BundleError):
        Manifest.from_bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        MANIFEST.to_bytes() + b" ",
        MANIFEST.to_bytes().replace(b'"format":1', b'"format":1.0'),
        MANIFEST.to_bytes().replace(b":0.05", b":5e-2"),
        MANIFEST.to_bytes().replace(b'"model":"model"', b'"model":"model","model":"model"'),
        b'{"a":' * 100_000,
        b"\xff" + MANIFEST.to_bytes(),
        RELEASE.to_bytes(),
    ],
    ids=["empty", "null", "list", "space", "float", "number", "twice", "deep", "utf-8", "release"],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        Manifest.from_bytes(data)


def test_too_long_a_manifest_is_refused_before_decoding() -> None:
    with pytest.raises(BundleError, match="too long"):
        Manifest.from_bytes(b" " * (8 * 1024 * 1024 + 1))


@given(st.binary(max_size=300))
def test_any_bytes_give_a_release_or_our_error(data: bytes) -> None:
    try:
        release = Release.from_bytes(data)
    except BundleError:
        return
    assert release.to_bytes() == data


@given(st.data())
def test_a_mutated_manifest_gives_a_manifest_or_our_error(data: st.DataObject) -> None:
    raw = bytearray(MANIFEST.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        manifest = Manifest.from_bytes(bytes(raw))
    except BundleError:
        return
    assert manifest.to_bytes() == raw


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"graphs_sha256": "ab"},
        {"metrics": {"a": float("inf")}},
        {"metrics": {str(i): 0.0 for i in range(33)}},
        {"created": -1.0},
        {"golden_inputs": None},
        {"golden_outputs": {"name": "golden_outputs.bin\n", "sha256": "ab" * 32, "size_bytes": 3}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_release_out_of_bounds_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BundleError):
        Release.from_bytes(canonical({**json.loads(RELEASE.to_bytes()), **change}))


def test_file_reference_knows_its_file() -> None:
    ref = FileRef.of(TEMPLATE, b"content")
    ref.check(b"content")
    for other in (b"contents", b"c0ntent", b""):
        with pytest.raises(BundleError):
            ref.check(other)
    with pytest.raises(BundleError, match="names no file"):
        MANIFEST.file("train_sgd.onnx")
