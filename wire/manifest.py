"""What a bundle says about itself: `Manifest` (fixed for a model's life) and `Release` (with every release).

Laws of the file: types and their checks only, no files, no keys; an unknown key, a wrong type, a value out
of bounds or two places that overlap is a `BundleError`; a value has one byte string (`to_bytes`), so a hash
names a meaning. Source: docs/architecture.md, "Bundle, checkpoint, release".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from wire.errors import BundleError
from wire.manifest_layout import Float32Layout, Int8Layout

MAX_MANIFEST_BYTES = 8 * 1024 * 1024
MAX_RELEASE_BYTES = 256 * 1024
MAX_FILE_BYTES = 512 * 1024 * 1024
MAX_ELEMENTS = 2**26
MAX_RANK = 8

TEMPLATE = "template.onnx"
FLOAT32 = "float32.onnx"
TRAIN_SGD = "train_sgd.onnx"
TRAIN_ADAM = "train_adam.onnx"
RANGES = "ranges.onnx"
MANIFEST = "manifest.json"
RELEASE = "release.json"
CHECKPOINT = "checkpoint.bin"
GOLDEN_INPUTS = "golden_inputs.bin"
GOLDEN_OUTPUTS = "golden_outputs.bin"
CARD = "CARD.md"
GRAPH_FILES = (TEMPLATE, FLOAT32, TRAIN_SGD, TRAIN_ADAM)

Name = Annotated[str, Meta(min_length=1, max_length=256)]
ModelName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}\Z")]
HexDigest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Size = Annotated[int, Meta(ge=0, le=MAX_ELEMENTS)]
Dimension = Annotated[int, Meta(ge=1, le=MAX_ELEMENTS)]
Shape = Annotated[tuple[Dimension, ...], Meta(max_length=MAX_RANK)]


class TensorSlot(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one tensor lies in a flat vector; `offset` and `size` count elements."""

    name: Name
    shape: Shape
    offset: Size
    size: Size


class TaskSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the model is for, and how it is judged.

    Attributes:
        kind: `classification` (labels are class numbers) or `anomaly` (no labels; the score is the loss).
        loss: name of the loss in the train step, such as `cross_entropy` or `mse`.
        metric: name of the reported metric, such as `accuracy` or `reconstruction_error`.
        higher_is_better: direction of the metric; a gate needs it.
        classes: number of classes; 0 for `anomaly`.
        labels: a name for each class, or empty.
    """

    kind: Literal["classification", "anomaly"]
    loss: Name
    metric: Name
    higher_is_better: bool
    classes: Annotated[int, Meta(ge=0, le=65_536)] = 0
    labels: Annotated[tuple[Name, ...], Meta(max_length=65_536)] = ()


class FileRef(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file by its content."""

    name: FileName
    sha256: HexDigest
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]

    @classmethod
    def of(cls, name: str, data: bytes) -> FileRef:
        """The reference to `data` under `name`."""
        return cls(name=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))

    def check(self, data: bytes) -> None:
        """Compares a file's bytes with the reference.

        Raises:
            BundleError: other length or hash.
        """
        if len(data) != self.size_bytes or hashlib.sha256(data).hexdigest() != self.sha256:
            raise BundleError(
                f"{self.name} is not the file that was signed for", size_bytes=len(data), expected=self.sha256
            )


class StateSizes(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Elements of `opt_state` for each optimizer's train step."""

    sgd: Annotated[int, Meta(ge=0, le=4 * MAX_ELEMENTS)]
    adam: Annotated[int, Meta(ge=0, le=4 * MAX_ELEMENTS)]


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model's graphs and how parameters are put into them. Fixed for the life of the model.

    Attributes:
        input_shape: one sample, without the batch axis; the input is called `x`.
        output_name: `logits` or `reconstruction`.
        params_size, buffers_size, ranges_count: P, Q and R of the checkpoint.
        files: the graph files that a device needs (`GRAPH_FILES`).
        cloud_files: graph files that stay in the cloud (`ranges.onnx`).
        golden_inputs_shape: float32 `[G, *input_shape]` of `golden_inputs.bin`.
        golden_outputs_shape: float32 `[2, G, …]` of `golden_outputs.bin`: answers of the int8 file, then of
            the float32 file.
        tolerance: a file passes its golden check when no output differs from its golden one by more than
            `tolerance · max(1, |golden|max)`.
    """

    format: Literal[1] = 1
    model: ModelName
    task: TaskSpec
    input_shape: Shape
    output_name: Name
    params_size: Dimension
    buffers_size: Size
    opt_state_sizes: StateSizes
    params: Annotated[tuple[TensorSlot, ...], Meta(min_length=1, max_length=4096)]
    buffers: Annotated[tuple[TensorSlot, ...], Meta(max_length=4096)]
    ranges_count: Annotated[int, Meta(ge=0, le=16_384)]
    int8: Int8Layout
    float32: Float32Layout
    files: Annotated[tuple[FileRef, ...], Meta(min_length=1, max_length=16)]
    cloud_files: Annotated[tuple[FileRef, ...], Meta(max_length=16)] = ()
    golden_inputs_shape: Shape
    golden_outputs_shape: Shape
    tolerance: Annotated[float, Meta(gt=0.0, le=1.0)]

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8."""
        return _to_json(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Reads and checks `manifest.json`.

        Raises:
            BundleError: not a manifest, or parts of it that do not agree with each other.
        """
        manifest = _from_json(data, cls, MAX_MANIFEST_BYTES)
        manifest.check()
        return manifest

    @property
    def graphs_sha256(self) -> str:
        """SHA-256 (hex) of `manifest.json`, which names every graph file's hash: the model's identity."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def file(self, name: str) -> FileRef:
        """The reference to a graph file.

        Raises:
            BundleError: the manifest names no such file.
        """
        for ref in self.files + self.cloud_files:
            if ref.name == name:
                return ref
        raise BundleError(f"the manifest of {self.model} names no file {name}", name=name)

    def check(self) -> None:
        """Compares the parts with each other.

        Raises:
            BundleError: names the parts that do not agree.
        """
        names = [ref.name for ref in self.files + self.cloud_files]
        _require(len(set(names)) == len(names), "two files with one name")
        _check_slots(self.params, self.params_size, "params")
        _check_slots(self.buffers, self.buffers_size, "buffers")
        classes, labels = self.task.classes, self.task.labels
        _require(not labels or len(labels) == classes, "the number of labels is not the number of classes")
        _require((classes > 0) == (self.task.kind == "classification"), "the classes do not fit the task")
        inputs, outputs = self.golden_inputs_shape, self.golden_outputs_shape
        _require(inputs[1:] == self.input_shape, "golden inputs have another shape than the input")
        _require(len(outputs) >= 2 and outputs[0] == 2, "golden outputs are not those of two files")
        _require(outputs[1:2] == inputs[:1], "golden outputs are not as many as golden inputs")
        _require(max(map(math.prod, (inputs, outputs))) <= MAX_ELEMENTS, "golden samples are too large")
        sizes = (self.params_size, self.buffers_size)
        self.int8.check(*sizes, self.ranges_count, self.file(TEMPLATE).size_bytes)
        self.float32.check(*sizes, self.file(FLOAT32).size_bytes)


class Release(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One release: parameters for a model's graphs, and what they make. `version` counts from 1 in a fleet.

    Attributes:
        int8_sha256, float32_sha256: hashes of what `materialize` gives; the signed hash decides.
        created: unix seconds.
    """

    format: Literal[1] = 1
    version: Annotated[int, Meta(ge=1, le=2**53)]
    graphs_sha256: HexDigest
    checkpoint_sha256: HexDigest
    int8_sha256: HexDigest
    float32_sha256: HexDigest
    golden_inputs: FileRef
    golden_outputs: FileRef
    metrics: Annotated[dict[Annotated[str, Meta(max_length=64)], float], Meta(max_length=32)] = {}
    created: Annotated[float, Meta(ge=0.0, le=1e11)] = 0.0

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8."""
        return _to_json(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Release:
        """Reads `release.json`.

        Raises:
            BundleError: not a release.
        """
        return _from_json(data, cls, MAX_RELEASE_BYTES)


S = TypeVar("S", bound=Struct)


def _to_json(value: Struct) -> bytes:
    plain = msgspec.to_builtins(value)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def _from_json(data: bytes, kind: type[S], limit_bytes: int) -> S:
    if len(data) > limit_bytes:
        raise BundleError(f"{kind.__name__} is too long", size_bytes=len(data), limit_bytes=limit_bytes)
    try:
        value = msgspec.json.decode(data, type=kind, strict=True)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"not a {kind.__name__}: {error}") from error
    if _to_json(value) != data:
        raise BundleError(f"{kind.__name__} is not in canonical form")
    return value


def _check_slots(slots: Iterable[TensorSlot], total: int, what: str) -> None:
    names: set[str] = set()
    end = 0
    for slot in slots:
        _require(slot.name not in names, f"two {what} are called {slot.name}")
        names.add(slot.name)
        _require(slot.offset == end, f"{what} {slot.name} does not follow the one before it")
        _require(slot.size == math.prod(slot.shape), f"{what} {slot.name} has another size than its shape")
        end += slot.size
    _require(end == total, f"{what} do not fill the vector")


def _require(condition: bool, message: str, **facts: Any) -> None:
    if not condition:
        raise BundleError(f"manifest: {message}", **facts)
