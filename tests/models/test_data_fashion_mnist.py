"""Fashion-MNIST: the reader against damaged files, and the real data where it is installed."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from models.data import fashion_mnist
from wire.errors import DataError

installed = pytest.mark.skipif(
    not fashion_mnist.FOLDER.exists(), reason="Debian's dataset-fashion-mnist is not installed"
)


def write_idx(path: Path, array: np.ndarray) -> None:  # type: ignore[type-arg]
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes(), 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for prefix, count in (("train", 60_000), ("t10k", 10_000)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", np.zeros((count, 28, 28), np.uint8))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    return tmp_path


def test_missing_data_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        fashion_mnist.load_images(tmp_path)
    assert caught.value.hint == "apt-get install dataset-fashion-mnist"


def test_files_of_the_right_shape_are_read(folder: Path) -> None:
    images = fashion_mnist.load_images(folder)
    assert images.train_images.shape == (60_000, 28, 28)
    assert images.test_labels[:11].tolist() == [*range(10), 0]


@pytest.mark.parametrize(
    "content",
    [
        b"not gzip",
        gzip.compress(b""),
        gzip.compress(bytes([0, 0, 8, 1]) + (10_000).to_bytes(4, "big") + bytes(9_999)),
        gzip.compress(bytes([0, 0, 8, 1]) + (10_000).to_bytes(4, "big") + bytes(10_001)),
        gzip.compress(bytes([0, 0, 13, 1]) + (10_000).to_bytes(4, "big") + bytes(10_000)),
        gzip.compress(bytes([0, 0, 8, 1]) + (10_000).to_bytes(4, "big") + bytes([11] * 10_000)),
        gzip.compress(bytes(20_000))[:-9],
    ],
    ids=["not-gzip", "empty", "short", "long", "float", "label", "cut"],
)
def test_damaged_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError):
        fashion_mnist.load_images(folder)


@installed
def test_federation_deals_out_the_whole_test_set() -> None:
    federation = fashion_mnist.federation(devices=20, samples=4_000)
    assert sum(len(split.test_y) for split in federation.devices.values()) == 10_000
    assert sum(len(split.train_y) + len(split.val_y) for split in federation.devices.values()) == 4_000
    images = np.concatenate([split.test_x for split in federation.devices.values()])
    # The test images are not those of the published constants, but near them.
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1.0) < 0.02
