"""An operator's samples: what is read, and every file that is refused before it can do harm."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.samples import read_samples
from wire.errors import DataError

X, Y = np.ones((3, 2)), np.array([0, 1, 2])


def save(tmp_path: Path, **arrays: Any) -> Path:
    np.savez(tmp_path / "s.npz", **arrays)
    return tmp_path / "s.npz"


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def archive(tmp_path: Path, x: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(tmp_path / "s.npz", "w", compression) as file:
        file.writestr("x.npy", x)
        file.writestr("y.npy", npy(Y))
    return tmp_path / "s.npz"


def test_samples_are_float32_and_int64(tmp_path: Path) -> None:
    read = read_samples(
        save(tmp_path, x=X, y=Y.astype(np.uint8)), "classification", input_shape=(2,), classes=3
    )
    assert (read.x.dtype, read.y.dtype) == (np.float32, np.int64)
    assert read.y.tolist() == [0, 1, 2]


def test_compressed_archive_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "s.npz", x=X, y=Y)
    assert read_samples(tmp_path / "s.npz", "classification").x.shape == (3, 2)


def test_task_without_labels_needs_none(tmp_path: Path) -> None:
    assert read_samples(save(tmp_path, x=X), "anomaly").y.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y": Y}, "has no array x"),
        ({"x": X}, "has no array y"),
        ({"x": X, "y": Y[:2]}, "not one whole number for each of 3 samples"),
        ({"x": X, "y": np.array([0, 1, -1])}, "y[2] is -1, the labels of the model are 0 to 2"),
        ({"x": X, "y": np.array([0, 3, 1])}, "y[1] is 3, the labels of the model are 0 to 2"),
        ({"x": X, "y": np.array([0, 2**64 - 1, 1], np.uint64)}, "y[1] is 18446744073709551615"),
        ({"x": X, "y": Y.astype(float)}, "y is float64 [3]"),
        ({"x": X, "y": np.eye(3, dtype=int)}, "y is int64 [3, 3]"),
        ({"x": X, "y": np.array(["a", "b", "c"])}, "y holds <U1, not numbers"),
        ({"x": np.array([[1, 2], [np.nan, 1], [1, 1]]), "y": Y}, "x[1] is not finite"),
        ({"x": X * 1e300, "y": Y}, "x[0] is not finite as float32"),
        ({"x": X.astype(complex), "y": Y}, "x holds complex128, not numbers"),
        ({"x": np.ones(3), "y": Y}, "x is [3], not [N, …]"),
        ({"x": np.float32(1), "y": Y}, "x is one number"),
        ({"x": np.ones((1, 2)), "y": Y[:1]}, "N from 2 up"),
        ({"x": np.ones((0, 2)), "y": Y[:0]}, "N from 2 up"),
        ({"x": np.ones((3, 0)), "y": Y}, "N from 2 up"),
        ({"x": np.ones((3, 4)), "y": Y}, "x holds samples of [4], the model takes [2]"),
        ({"x": np.zeros(3, [("a", "f4")]), "y": Y}, "not numbers"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as refused:
        read_samples(save(tmp_path, **arrays), "classification", input_shape=(2,), classes=3)
    assert said in str(refused.value)
    assert str(tmp_path / "s.npz") in str(refused.value)
    assert refused.value.hint


class Explosive:
    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.mkdir, ("unpickled",)


def test_objects_are_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, x=np.array([[Explosive(), Explosive()]] * 3, object), y=Y)
    with pytest.raises(DataError, match="x holds object, not numbers"):
        read_samples(path, "classification")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    "x",
    [
        npy(X)[:-1],
        npy(X) + b"0",
        npy(X)[:20],
        b"",
        b"hello",
        npy(X).replace(b"(3, 2)", b"(-3,2)"),
        npy(X).replace(b"'shape': (3, 2)", b"'shape': (9**99,)"),
        npy(X)[:10] + b"(" * 118 + npy(X)[128:],
    ],
)
def test_array_that_does_not_keep_what_its_header_says_is_refused(tmp_path: Path, x: bytes) -> None:
    with pytest.raises(DataError):
        read_samples(archive(tmp_path, x), "classification")


def test_header_that_claims_a_giant_allocates_nothing(tmp_path: Path) -> None:
    giant = npy(X).replace(b"(3, 2), }", b"(3, 2%s), }" % (b"0" * 15))[: len(npy(X))]
    with pytest.raises(DataError):
        read_samples(archive(tmp_path, giant), "classification")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archive_that_was_damaged_anywhere_is_refused_or_read_as_it_was(
    tmp_path: Path, compression: int
) -> None:
    whole = archive(tmp_path, npy(X), compression).read_bytes()
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        (tmp_path / "s.npz").write_bytes(damaged)
        try:
            read = read_samples(tmp_path / "s.npz", "classification")
        except DataError:
            continue
        assert (read.x == X).all()
    for size in range(0, len(whole), 7):
        (tmp_path / "s.npz").write_bytes(whole[:size])
        with pytest.raises(DataError):
            read_samples(tmp_path / "s.npz", "classification")


def test_path_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("one.npy", "text.npz", "empty.npz", "absent.npz", "folder.npz", "pipe.npz"):
        with pytest.raises(DataError, match=name):
            read_samples(tmp_path / name, "classification")
