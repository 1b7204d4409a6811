"""Fashion-MNIST from Debian's package, divided among devices by a Dirichlet distribution of labels.

Laws of the file: a file's header says its size and the size is checked before an array is made; the test images are
for the report alone. Source: Xiao et al., https://arxiv.org/abs/1708.07747 (MIT licence); the IDX format of MNIST.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.data.federation import Federation, Floats, Labels, Split
from models.data.partition import partition_dirichlet
from wire.errors import DataError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
LABELS = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
INPUT_SHAPE = (1, 28, 28)
# Over the 60,000 training images, as every paper states them.
MEAN, DEVIATION = 0.2860, 0.3530

_HINT = "apt-get install dataset-fashion-mnist"
_UINT8 = 0x08
_VALIDATION_PERCENT = 10
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Images:
    """The data set: uint8 [60000, 28, 28] and [10000, 28, 28], labels int64."""

    train_images: Bytes
    train_labels: Labels
    test_images: Bytes
    test_labels: Labels


def load_images(folder: Path = FOLDER) -> Images:
    """Reads the four files.

    Raises:
        DataError: (operator) a file is missing or damaged.
    """
    train, train_labels = _read_pair(folder, "train", 60_000)
    test, test_labels = _read_pair(folder, "t10k", 10_000)
    return Images(train, train_labels, test, test_labels)


def normalize(images: Bytes) -> Floats:
    """Images uint8 [N, 28, 28] as a model takes them: float32 [N, 1, 28, 28]."""
    scaled: Floats = (images[:, None].astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(
        DEVIATION
    )
    return scaled


def federation(
    devices: int = 20,
    alpha: float = 0.3,
    seed: int = 0,
    *,
    operator_samples: int = 1000,
    samples: int | None = None,
    folder: Path = FOLDER,
) -> Federation:
    """Fashion-MNIST divided among `devices`.

    Args:
        operator_samples: training images that are the operator's own; the rest are divided.
        samples: training images to divide at most, or None for all of them.

    Raises:
        DataError: (operator) the data set is not installed.
        ConfigurationError: (operator) it cannot be divided so.
    """
    images = load_images(folder)
    order = np.random.default_rng([seed, 1]).permutation(len(images.train_labels))
    own, rest = order[:operator_samples], order[operator_samples:][:samples]
    # Test images are dealt out evenly: over all devices the report is on the 10,000 that everyone reports.
    shares = partition_dirichlet(images.train_labels[rest], devices, alpha, seed)
    return Federation(
        name="fashion-mnist",
        labels=LABELS,
        input_shape=INPUT_SHAPE,
        operator=_split(images, own, np.arange(len(images.test_labels))),
        devices={
            f"device-{number:03d}": _split(
                images, rest[share], np.arange(number, len(images.test_labels), devices)
            )
            for number, share in enumerate(shares)
        },
    )


def _split(images: Images, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> Split:
    kept = len(train) - len(train) * _VALIDATION_PERCENT // 100
    first, second = train[:kept], train[kept:]
    return Split(
        normalize(images.train_images[first]),
        images.train_labels[first],
        normalize(images.train_images[second]),
        images.train_labels[second],
        normalize(images.test_images[test]),
        images.test_labels[test],
    )


def _read_pair(folder: Path, prefix: str, count: int) -> tuple[Bytes, Labels]:
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (count, 28, 28))
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (count,))
    if labels.max() >= len(LABELS):
        raise DataError(f"{folder} has labels above {len(LABELS) - 1}", hint=_HINT)
    return images, labels.astype(np.int64)


def _read_idx(path: Path, shape: tuple[int, ...]) -> Bytes:
    header = bytes([0, 0, _UINT8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    size_bytes = len(header) + prod(shape)
    try:
        with gzip.open(path) as file:
            # One byte more than there should be: a bomb is noticed without being unpacked.
            data = file.read(size_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}", hint=_HINT, path=str(path)) from error
    if len(data) != size_bytes or not data.startswith(header):
        raise DataError(f"{path} does not hold {shape} bytes in the IDX format", hint=_HINT, path=str(path))
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)
