"""From a trained torch module to a bundle: export both train steps, quantize, measure, write, and check what
was made.

Laws of the file: no bundle is written whose int8 file is not, byte for byte, what onnxruntime's
`quantize_static` makes of the same parameters, and none that does not give its golden answers when it is
opened again from disk. Nothing here reads the clock or the network: the same module and data give the same
bytes on the same machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import nn

from models.bundle import CALIBRATION, Bundle
from models.candidate import Candidate, golden_outputs
from models.card import CardNotes, write_card
from models.evaluate import answers_of, evaluate
from models.quantize.quantized import Quantized, quantize
from models.task import Task
from models.train_step import SamplePrivacy, export_train_step
from wire import manifest as names
from wire.errors import BundleError, DataError
from wire.manifest import FileRef, Manifest, StateSizes, TaskSpec
from wire.materialize import materialize_float32, materialize_int8

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

GOLDEN_SAMPLES = 8
MAX_CALIBRATION = 512
# Of the largest golden output: integer kernels of another processor may round a step of 1/255 otherwise.
TOLERANCE = 0.05
_OUTPUT_NAMES = {"classification": "logits", "anomaly": "reconstruction"}


def build_bundle(
    module: nn.Module,
    task: Task,
    input_shape: Sequence[int],
    calibration_x: Floats,
    *,
    name: str,
    out_dir: Path,
    labels: tuple[str, ...] = (),
    evaluation: tuple[Floats, Labels] | None = None,
    notes: CardNotes | None = None,
    privacy: SamplePrivacy | None = None,
    created: float = 0.0,
) -> Bundle:
    """Builds a bundle whose first release holds the module's parameters.

    Args:
        module: trained, float32, on the CPU; not changed.
        task: what it is trained for.
        input_shape: of one sample, without the batch.
        calibration_x: float32 [N, *input_shape], samples of the operator; 512 of them, evenly spaced, are
            used and stay with the bundle in the cloud, 8 travel with it as golden inputs.
        name: of the model, `[A-Za-z0-9_-]{1,64}`.
        out_dir: a folder that does not exist yet.
        labels: name of each class, in order.
        evaluation: held-out x float32 [N, …] and y int64 [N] to report the metric of both files on.
        notes: what the model card says beyond the facts.
        privacy: devices train by DP-SGD; None for the usual step.
        created: unix seconds, for the release.

    Raises:
        UnsupportedLayerError: a layer cannot be trained on a device; names it and the substitute.
        ModelError: the module cannot be exported, or a graph differs from torch.
        DataError: the calibration samples do not fit.
        BundleError: the folder is taken, or what was made does not pass its own checks.
    """
    shape = tuple(input_shape)
    windows = _evenly(_checked(calibration_x, shape), MAX_CALIBRATION)
    quantized = quantize(module, shape, _OUTPUT_NAMES[task.kind], windows)
    steps = {
        optimizer: export_train_step(module, task, shape, optimizer, privacy) for optimizer in ("sgd", "adam")
    }
    files = {
        names.TEMPLATE: quantized.template,
        names.FLOAT32: quantized.float32,
        names.TRAIN_SGD: steps["sgd"].model,
        names.TRAIN_ADAM: steps["adam"].model,
        names.RANGES: quantized.ranges_graph,
        CALIBRATION: windows.astype("<f4").tobytes(),
    }
    golden = _evenly(windows, GOLDEN_SAMPLES)
    states = StateSizes(**{key: step.opt_state_size for key, step in steps.items()})
    manifest = _manifest(name, task.spec(labels), shape, quantized, states, files, golden)
    candidate = _candidate(manifest, quantized, files, golden)
    files |= {
        names.CHECKPOINT: candidate.checkpoint.to_bytes(),
        names.GOLDEN_INPUTS: candidate.golden_inputs,
        names.GOLDEN_OUTPUTS: candidate.golden_outputs,
    }
    metrics = _measure(manifest, candidate, evaluation)
    samples = 0 if evaluation is None else len(evaluation[0])
    sizes = {file: len(data) for file, data in files.items()}
    card = write_card(manifest, notes or CardNotes(), sizes, metrics, samples)
    bundle = Bundle.write(out_dir, manifest, candidate.release(1, metrics, created), files, card)
    check_bundle(bundle)
    return bundle


def check_bundle(bundle: Bundle) -> None:
    """Fills both templates from the files on disk, and compares hashes and golden answers.

    Raises:
        BundleError: what the bundle makes is not what its release says.
        ModelError: a file does not run.
    """
    manifest, release, checkpoint = bundle.manifest, bundle.release, bundle.checkpoint()
    inputs, golden = bundle.golden_inputs(), bundle.golden_outputs()
    int8 = materialize_int8(bundle.read(names.TEMPLATE), manifest, checkpoint)
    float32 = materialize_float32(bundle.read(names.FLOAT32), manifest, checkpoint)
    wanted_hashes = (release.int8_sha256, release.float32_sha256)
    for data, wanted, sha256 in zip((int8, float32), golden, wanted_hashes, strict=True):
        if hashlib.sha256(data).hexdigest() != sha256:
            raise BundleError(f"the bundle of {manifest.model} does not make the file of its release")
        difference = float(np.abs(answers_of(data, inputs) - wanted).max())
        if not difference <= manifest.tolerance * max(1.0, float(np.abs(wanted).max())):
            raise BundleError(
                f"the bundle of {manifest.model} misses its golden answers", difference=difference
            )


def _manifest(
    name: str,
    task: TaskSpec,
    shape: tuple[int, ...],
    quantized: Quantized,
    states: StateSizes,
    files: Mapping[str, bytes],
    golden: Floats,
) -> Manifest:
    manifest = Manifest(
        model=name,
        task=task,
        input_shape=shape,
        output_name=_OUTPUT_NAMES[task.kind],
        params_size=quantized.checkpoint.params.size,
        buffers_size=quantized.checkpoint.buffers.size,
        opt_state_sizes=states,
        params=quantized.params,
        buffers=quantized.buffers,
        ranges_count=len(quantized.checkpoint.ranges),
        int8=quantized.int8_layout,
        float32=quantized.float32_layout,
        files=tuple(FileRef.of(file, files[file]) for file in names.GRAPH_FILES),
        cloud_files=tuple(FileRef.of(file, files[file]) for file in (names.RANGES, CALIBRATION)),
        golden_inputs_shape=golden.shape,
        golden_outputs_shape=(2, len(golden), *quantized.output_shape),
        tolerance=TOLERANCE,
    )
    # Through the bytes: a name or shape out of bounds is refused before anything is written.
    return Manifest.from_bytes(manifest.to_bytes())


def _candidate(
    manifest: Manifest, quantized: Quantized, files: Mapping[str, bytes], golden: Floats
) -> Candidate:
    checkpoint = quantized.checkpoint
    int8 = materialize_int8(files[names.TEMPLATE], manifest, checkpoint)
    if int8 != quantized.reference:
        raise BundleError(
            f"materialize does not give the bytes of quantize_static for {manifest.model}",
            hint="this model, or this version of onnxruntime, quantizes in a way that is not known here",
        )
    float32 = materialize_float32(files[names.FLOAT32], manifest, checkpoint)
    return Candidate(
        graphs_sha256=manifest.graphs_sha256,
        checkpoint=checkpoint,
        int8=int8,
        float32=float32,
        golden_inputs=golden.astype("<f4").tobytes(),
        golden_outputs=golden_outputs(int8, float32, golden),
    )


def _measure(
    manifest: Manifest, candidate: Candidate, evaluation: tuple[Floats, Labels] | None
) -> dict[str, float]:
    """Loss and metric of both files, and how far int8 is from float32 on the golden inputs (relative)."""
    answers = np.frombuffer(candidate.golden_outputs, "<f4").reshape(manifest.golden_outputs_shape)
    largest = max(float(np.abs(answers[1]).max()), float(np.finfo(np.float32).tiny))
    metrics = {"int8_difference": float(np.abs(answers[0] - answers[1]).max()) / largest}
    if evaluation is not None:
        for kind, data in (("int8", candidate.int8), ("float32", candidate.float32)):
            score = evaluate(data, manifest.task, *evaluation)
            metrics |= {f"{manifest.task.metric}_{kind}": score.metric, f"loss_{kind}": score.loss}
    return metrics


def _checked(windows: Floats, shape: tuple[int, ...]) -> Floats:
    if windows.dtype != np.float32 or windows.shape[1:] != shape or not len(windows):
        raise DataError(
            f"calibration samples are {windows.dtype} {windows.shape}, wanted float32 [N, *{shape}]",
            hint="give some samples of the operator's own data, shaped like the model's input",
        )
    if not np.isfinite(windows).all():
        raise DataError("a calibration sample holds a number that is not finite")
    return windows


def _evenly(windows: Floats, count: int) -> Floats:
    """At most `count` windows, spaced evenly: data sets come sorted, and the first ones are of one class."""
    chosen = np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(np.int64)
    return np.ascontiguousarray(windows[chosen])
