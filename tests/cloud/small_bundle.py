"""A bundle whose files are named by hash and whose graphs nobody will run: for what only moves files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.bundle import CALIBRATION, Bundle
from models.candidate import Candidate
from wire.checkpoint import Checkpoint
from wire.manifest import (
    CHECKPOINT,
    GOLDEN_INPUTS,
    GOLDEN_OUTPUTS,
    GRAPH_FILES,
    RANGES,
    FileRef,
    Manifest,
    StateSizes,
    TaskSpec,
    TensorSlot,
)
from wire.manifest_layout import Float32Layout, Int8Layout

GOLDEN_IN = np.ones((1, 4), np.float32).tobytes()
GOLDEN_OUT = np.ones((2, 1, 3), np.float32).tobytes()


def empty_graph(text: str) -> bytes:
    """An ONNX file of nothing but its producer's name."""
    return bytes([0x08, 8, 0x42, 2, 0x10, 18, 0x12, len(text)]) + text.encode() + bytes([0x3A, 0])


def make_checkpoint(seed: int) -> Checkpoint:
    params = np.random.default_rng(seed).standard_normal(12).astype(np.float32)
    return Checkpoint(params, np.zeros(0, np.float32), np.zeros((0, 2), np.float32))


def make_manifest(name: str = "small") -> Manifest:
    return Manifest(
        model=name,
        task=TaskSpec(
            kind="classification", loss="cross_entropy", metric="accuracy", higher_is_better=True, classes=3
        ),
        input_shape=(4,),
        output_name="logits",
        params_size=12,
        buffers_size=0,
        opt_state_sizes=StateSizes(sgd=12, adam=25),
        params=(TensorSlot(name="w", shape=(3, 4), offset=0, size=12),),
        buffers=(),
        ranges_count=0,
        int8=Int8Layout(weight_max=127, layers=(), ranges=()),
        float32=Float32Layout(layers=()),
        files=tuple(FileRef.of(file, empty_graph(f"{name} {file}")) for file in GRAPH_FILES),
        cloud_files=(FileRef.of(RANGES, empty_graph("ranges")), FileRef.of(CALIBRATION, GOLDEN_IN)),
        golden_inputs_shape=(1, 4),
        golden_outputs_shape=(2, 1, 3),
        tolerance=0.1,
    )


def make_candidate(seed: int, manifest: Manifest | None = None) -> Candidate:
    return Candidate(
        graphs_sha256=(manifest or make_manifest()).graphs_sha256,
        checkpoint=make_checkpoint(seed),
        int8=b"int8 %d" % seed,
        float32=b"float32 %d" % seed,
        golden_inputs=GOLDEN_IN,
        golden_outputs=GOLDEN_OUT,
    )


def write_bundle(folder: Path, *, name: str = "small", seed: int = 0) -> Bundle:
    manifest = make_manifest(name)
    candidate = make_candidate(seed, manifest)
    files = {file: empty_graph(f"{name} {file}") for file in GRAPH_FILES}
    files |= {
        RANGES: empty_graph("ranges"),
        CALIBRATION: GOLDEN_IN,
        CHECKPOINT: candidate.checkpoint.to_bytes(),
    }
    files |= {GOLDEN_INPUTS: GOLDEN_IN, GOLDEN_OUTPUTS: GOLDEN_OUT}
    return Bundle.write(folder, manifest, candidate.release(1, {"accuracy": 0.5}, 0.0), files, "# card\n")
