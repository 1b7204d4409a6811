"""Handwritten digits in 8 × 8 pixels: 1,797 samples of 13 people, divided among devices by a Dirichlet distribution of
labels.

Laws of the file: the file's order is that of the people who wrote (their names are not in it), and the split follows
it: the operator has the first tenth, devices share what follows, and the last 30 % are for the report alone, so that
most of them were written by people whom no model has seen. Source: E. Alpaydin and C. Kaynak, the test set of
https://doi.org/10.24432/C50P49, by way of scikit-learn (`make_digits.py`).
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.data.federation import Federation, Floats, Labels, Split
from models.data.partition import partition_dirichlet
from wire.errors import DataError

FILE = Path(__file__).with_name("digits.npz")
FILE_SHA256 = "90a82fb616aae7804b66027d675a13713c4f205a8546b24fa478c9df58107291"
LABELS = tuple("0123456789")
INPUT_SHAPE = (64,)
# Pixels are counts from 0 to 16.
MIDDLE, HALF_RANGE = 8.0, 8.0
OPERATOR_PERCENT, TEST_PERCENT, VALIDATION_PERCENT = 10, 30, 20
_SMALLEST_SHARE = 10
Indices = npt.NDArray[np.int64]


def load_digits() -> tuple[Floats, Labels]:
    """All digits in the order of the file: float32 [1797, 64] between -1 and 1, int64 [1797].

    Raises:
        DataError: (operator) the file is missing or is another one.
    """
    hint = "install from a clone, or make the file with models/data/make_digits.py"
    try:
        data = FILE.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {FILE}: {error.strerror}", hint=hint) from error
    if hashlib.sha256(data).hexdigest() != FILE_SHA256:
        raise DataError(f"{FILE} is not the digits", hint=hint)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            pixels, labels = archive["pixels"], archive["label"]
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{FILE} holds no digits", hint=hint) from error
    scaled: Floats = (pixels.astype(np.float32) - np.float32(MIDDLE)) / np.float32(HALF_RANGE)
    return scaled, labels.astype(np.int64)


def federation(devices: int = 16, alpha: float = 0.3, seed: int = 0) -> Federation:
    """The digits divided among `devices`.

    Raises:
        DataError: (operator) the file is missing or is another one.
        ConfigurationError: (operator) it cannot be divided so.
    """
    x, y = load_digits()
    first, second = len(y) * OPERATOR_PERCENT // 100, len(y) * (100 - TEST_PERCENT) // 100
    order = np.arange(len(y))
    own, shared, later = order[:first], order[first:second], order[second:]
    rng = np.random.default_rng([seed, 1])
    shares = partition_dirichlet(y[shared], devices, alpha, seed, smallest=_SMALLEST_SHARE)
    return Federation(
        name="digits",
        labels=LABELS,
        input_shape=INPUT_SHAPE,
        operator=_split(x, y, rng.permutation(own), later),
        # The later digits are dealt out evenly: over all devices the report is on each of them once.
        devices={
            f"device-{number:03d}": _split(x, y, shared[share], later[number::devices])
            for number, share in enumerate(shares)
        },
    )


def _split(x: Floats, y: Labels, own: Indices, test: Indices) -> Split:
    kept = len(own) - len(own) * VALIDATION_PERCENT // 100
    train, val = own[:kept], own[kept:]
    return Split(x[train], y[train], x[val], y[val], x[test], y[test])
