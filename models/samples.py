"""Samples of an operator: `x` and `y` of an `.npz` file, to build a model of, to refine it on, to judge it by.

Laws of the file: nothing is unpickled; what an array says of its size is compared with the archive before anything is
allocated; whoever reads samples here gets finite float32 and labels that the task has, or an error that names the file.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wire.errors import DataError

MAX_ARRAY_BYTES = 16 * 2**30
MAX_CLASSES = 65_536
"""As many as a manifest can name."""
MIN_SAMPLES = 2
_HINT = "np.savez(path, x=samples, y=labels)"
_NOT_OURS = (
    *(zipfile.BadZipFile, zlib.error, ValueError, EOFError, MemoryError),
    RuntimeError,  # a password, or (NotImplementedError) a compression that zipfile does not know
    *(SyntaxError, tokenize.TokenError),  # numpy reads a header as Python's literals
)
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True, eq=False)
class Samples:
    """The operator's samples: x float32 [N, …], y int64 [N] (zeros for a task without labels)."""

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]


def read_samples(
    path: Path,
    kind: Literal["classification", "anomaly"],
    *,
    input_shape: tuple[int, ...] | None = None,
    classes: int = MAX_CLASSES,
) -> Samples:
    """Reads `x` and, for a classification, `y` of an `.npz` file; a task without labels needs no `y`.

    Args:
        input_shape: of one sample, where a model fixes it.
        classes: of the model; labels are 0 to `classes` - 1.

    Raises:
        DataError: (operator) no such file, or not finite numbers `x` [N, …] with N from 2 up, each with a label of the
            model.
    """
    if not path.exists():
        raise DataError(f"there is no {path} to read samples from", hint=_HINT)
    if not path.is_file():
        raise DataError(f"{path} is not a file of samples", hint=_HINT)
    try:
        with zipfile.ZipFile(path) as archive:
            x = _read_array(archive, "x", path)
            y = _read_array(archive, "y", path) if kind == "classification" else np.zeros(len(x), np.int64)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", hint=_HINT) from error
    except _NOT_OURS as error:
        raise DataError(f"{path} is not an .npz file of x and y: {error}"[:300], hint=_HINT) from error
    return Samples(_checked_x(x, path, input_shape), _checked_y(y, len(x), path, classes))


def _read_array(archive: zipfile.ZipFile, name: str, path: Path) -> npt.NDArray[Any]:
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError as error:
        raise DataError(f"{path} has no array {name}", hint=_HINT) from error
    with archive.open(info) as file:
        read_header = _READ_HEADER.get(np.lib.format.read_magic(file))
        if read_header is None:
            raise DataError(f"{path}: {name} is of a kind that holds no numbers", hint=_HINT)
        shape, _, dtype = read_header(file)
        size_bytes = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "fiub":
            raise DataError(f"{path}: {name} holds {dtype}, not numbers", hint=_HINT)
        if size_bytes != info.file_size - file.tell():
            raise DataError(f"{path}: {name} is cut off: {list(shape)} {dtype} was saved", hint=_HINT)
        if size_bytes > MAX_ARRAY_BYTES:
            raise DataError(f"{path}: {name} is above {MAX_ARRAY_BYTES} bytes", hint="give fewer samples")
    with archive.open(info) as file:
        array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    if not array.ndim:
        raise DataError(f"{path}: {name} is one number, not an array", hint=_HINT)
    return array


def _checked_x(
    x: npt.NDArray[Any], path: Path, input_shape: tuple[int, ...] | None
) -> npt.NDArray[np.float32]:
    if x.ndim < 2 or len(x) < MIN_SAMPLES or not x.size:
        raise DataError(f"{path}: x is {list(x.shape)}, not [N, …] with N from {MIN_SAMPLES} up", hint=_HINT)
    if input_shape is not None and x.shape[1:] != input_shape:
        raise DataError(
            f"{path}: x holds samples of {list(x.shape[1:])}, the model takes {list(input_shape)}",
            hint=f"save it as float32 [N, {', '.join(map(str, input_shape))}]",
        )
    with np.errstate(over="ignore"):
        numbers = x.astype(np.float32, copy=False)
    is_finite = np.isfinite(numbers).reshape(len(x), -1).all(1)
    if not is_finite.all():
        raise DataError(
            f"{path}: x[{int(is_finite.argmin())}] is not finite as float32",
            hint="leave samples with NaN or infinity out",
        )
    return numbers


def _checked_y(y: npt.NDArray[Any], count: int, path: Path, classes: int) -> npt.NDArray[np.int64]:
    if y.dtype.kind not in "iu" or y.shape != (count,):
        raise DataError(
            f"{path}: y is {y.dtype} {list(y.shape)}, not one whole number for each of {count} samples",
            hint="y=labels.astype(np.int64), class numbers from 0 up",
        )
    wrong = (y < 0) | (y >= classes)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{path}: y[{row}] is {y[row]}, the labels of the model are 0 to {classes - 1}",
            hint="number the classes from 0 up, in the order of the model's labels",
        )
    return y.astype(np.int64)
