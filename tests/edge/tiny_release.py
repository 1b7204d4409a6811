"""A model of six parameters with a real manifest, templates and checkpoint: what slots and the TUF client
carry.

The graph files are ONNX files of one tensor and no node: nothing in these tests runs them.
"""

from __future__ import annotations

import hashlib

import numpy as np

from wire.checkpoint import Checkpoint
from wire.manifest import (
    CHECKPOINT,
    FLOAT32,
    GOLDEN_INPUTS,
    GOLDEN_OUTPUTS,
    MANIFEST,
    RELEASE,
    TEMPLATE,
    TRAIN_ADAM,
    TRAIN_SGD,
    FileRef,
    Manifest,
    Release,
    StateSizes,
    TaskSpec,
    TensorSlot,
)
from wire.manifest_layout import Float32Layer, Float32Layout, Int8Layer, Int8Layout, Int8Range, LayerSource
from wire.materialize import materialize_float32, materialize_int8


class SteppedClock:
    """A clock that stands still until it is moved."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.seconds = now

    def now(self) -> float:
        return self.seconds

    def monotonic(self) -> float:
        return self.seconds


PREFIX_BYTES = 32
_DOC = bytes([0x32, 0xB0, 0x09])  # the doc_string of a model, 1,200 bytes


def _one_tensor(model: str, fill: bytes) -> bytes:
    """An ONNX file that ends with the 64 bytes of its one float32 tensor, which begin at `PREFIX_BYTES`."""
    tensor = bytes([0x08, 16, 0x10, 1, 0x4A, 64]) + bytes(64)
    graph = bytes([0x2A, len(tensor)]) + tensor
    head = bytes([0x08, 8, 0x42, 2, 0x10, 18, 0x12, 14]) + model.encode()[:14].ljust(14, fill)
    return head + bytes([0x3A, len(graph)]) + graph


def graph_files(model: str = "tiny") -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and the graph files of a model; another name gives other graphs."""
    graphs = {
        TEMPLATE: _one_tensor(model, b"t"),
        FLOAT32: _one_tensor(model, b"f"),
        TRAIN_SGD: _one_tensor("sgd", b"s") + _DOC + b"sgd" * 400,
        TRAIN_ADAM: _one_tensor("adam", b"a") + _DOC + b"adam" * 300,
    }
    source = LayerSource(name="dense", weight=0, shape=(2, 2), bias=4)
    manifest = Manifest(
        model=model,
        task=TaskSpec(
            kind="classification", loss="cross_entropy", metric="accuracy", higher_is_better=True, classes=2
        ),
        input_shape=(2,),
        output_name="logits",
        params_size=6,
        buffers_size=0,
        opt_state_sizes=StateSizes(sgd=6, adam=12),
        params=(
            TensorSlot(name="w", shape=(2, 2), offset=0, size=4),
            TensorSlot(name="b", shape=(2,), offset=4, size=2),
        ),
        buffers=(),
        ranges_count=1,
        int8=Int8Layout(
            weight_max=127,
            layers=(
                Int8Layer(
                    source=source, weight_at=32, scale_at=36, bias_at=44, bias_scale_at=52, input_range=0
                ),
            ),
            ranges=(Int8Range(range=0, tensor="x", scale_at=60, zero_point_at=64),),
        ),
        float32=Float32Layout(layers=(Float32Layer(source=source, weight_at=32, bias_at=48),)),
        files=tuple(FileRef.of(name, data) for name, data in graphs.items()),
        golden_inputs_shape=(1, 2),
        golden_outputs_shape=(2, 1, 2),
        tolerance=0.1,
    )
    return manifest, {**graphs, MANIFEST: manifest.to_bytes()}


def tiny_release(version: int, *, model: str = "tiny") -> tuple[Release, dict[str, bytes]]:
    """A release and all of its files, `release.json` and the graph files included."""
    manifest, files = graph_files(model)
    values = np.arange(6, dtype=np.float32) / 7 + np.float32(version)
    checkpoint = Checkpoint(values, np.zeros(0, np.float32), np.array([[-1, 1]], np.float32))
    golden_inputs = np.ones((1, 2), "<f4").tobytes()
    golden_outputs = np.full((2, 1, 2), version, "<f4").tobytes()
    int8 = materialize_int8(files[TEMPLATE], manifest, checkpoint)
    float32 = materialize_float32(files[FLOAT32], manifest, checkpoint)
    release = Release(
        version=version,
        graphs_sha256=manifest.graphs_sha256,
        checkpoint_sha256=checkpoint.sha256.hex(),
        int8_sha256=hashlib.sha256(int8).hexdigest(),
        float32_sha256=hashlib.sha256(float32).hexdigest(),
        golden_inputs=FileRef.of(GOLDEN_INPUTS, golden_inputs),
        golden_outputs=FileRef.of(GOLDEN_OUTPUTS, golden_outputs),
        created=float(version),
    )
    files |= {
        RELEASE: release.to_bytes(),
        CHECKPOINT: checkpoint.to_bytes(),
        GOLDEN_INPUTS: golden_inputs,
        GOLDEN_OUTPUTS: golden_outputs,
    }
    return release, files
