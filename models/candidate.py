"""New parameters for a bundle's graphs: ranges, both files, golden answers; what a release is made of.

Laws of the file: nothing is exported; the files are what `materialize` gives on a device. One
`CandidateMaker` is kept for a model, because it holds the session that measures ranges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.bundle import Bundle
from models.evaluate import answers_of
from models.quantize.ranges import Calibrator
from wire.checkpoint import Checkpoint
from wire.manifest import FLOAT32, GOLDEN_INPUTS, GOLDEN_OUTPUTS, RANGES, TEMPLATE, FileRef, Release
from wire.materialize import materialize_float32, materialize_int8

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Candidate:
    """What could be released.

    Attributes:
        graphs_sha256: of the manifest (hex).
        checkpoint: params, buffers and fresh ranges.
        int8, float32: the two model files.
        golden_inputs, golden_outputs: the files of those names.
    """

    graphs_sha256: str
    checkpoint: Checkpoint
    int8: bytes
    float32: bytes
    golden_inputs: bytes
    golden_outputs: bytes

    def release(self, version: int, metrics: Mapping[str, float], created: float) -> Release:
        """The release record under a version; `created` in unix seconds."""
        return Release(
            version=version,
            graphs_sha256=self.graphs_sha256,
            checkpoint_sha256=self.checkpoint.sha256.hex(),
            int8_sha256=hashlib.sha256(self.int8).hexdigest(),
            float32_sha256=hashlib.sha256(self.float32).hexdigest(),
            golden_inputs=FileRef.of(GOLDEN_INPUTS, self.golden_inputs),
            golden_outputs=FileRef.of(GOLDEN_OUTPUTS, self.golden_outputs),
            metrics=dict(metrics),
            created=created,
        )


class CandidateMaker:
    """Makes candidates for one bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self._manifest = bundle.manifest
        self._template = bundle.read(TEMPLATE)
        self._float32 = bundle.read(FLOAT32)
        self._calibrator = Calibrator(bundle.read(RANGES))
        self._calibration = bundle.calibration()
        self._golden = bundle.golden_inputs()

    def checkpoint(self, params: Floats, buffers: Floats) -> Checkpoint:
        """The parameters with ranges measured on the bundle's calibration windows; no file is made.

        Args:
            params: float32 [P].
            buffers: float32 [Q].

        Raises:
            BundleError: the vectors are not finite or of another model.
            ModelError: an activation is not finite.
        """
        return Checkpoint(params, buffers, self._calibrator.ranges(params, buffers, self._calibration))

    def make(self, params: Floats, buffers: Floats) -> Candidate:
        """As `checkpoint`, and `fill`."""
        return self.fill(self.checkpoint(params, buffers))

    def fill(self, checkpoint: Checkpoint) -> Candidate:
        """Both files of a checkpoint whose ranges are its own.

        Raises:
            BundleError: it is of another model, or not finite.
            ModelError: an answer is not finite.
        """
        int8 = materialize_int8(self._template, self._manifest, checkpoint)
        float32 = materialize_float32(self._float32, self._manifest, checkpoint)
        return Candidate(
            graphs_sha256=self._manifest.graphs_sha256,
            checkpoint=checkpoint,
            int8=int8,
            float32=float32,
            golden_inputs=self._golden.astype("<f4").tobytes(),
            golden_outputs=golden_outputs(int8, float32, self._golden),
        )


def golden_outputs(int8: bytes, float32: bytes, inputs: Floats) -> bytes:
    """`golden_outputs.bin`: answers of the int8 file, then of the float32 file, float32 [2, G, …]."""
    answers = np.stack([answers_of(int8, inputs), answers_of(float32, inputs)])
    return answers.astype("<f4").tobytes()
