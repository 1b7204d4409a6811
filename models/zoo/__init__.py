"""Small models that Shoal ships, one file each; a model's file is imported when it is asked for.

Each file has `make_model() -> nn.Module`, `TASK` and `INPUT_SHAPE` (one sample, without the batch), and the
bundle, the train step and the demo need nothing else. They prefer GroupNorm or no norm: BatchNorm's
statistics travel apart and mix people's data in one average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

from wire.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import nn

    from models.task import Task


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """A model by name, before its file is imported.

    Attributes:
        name: of the model and of its file.
        data: name of the data set that it is made for.
        summary: one sentence for a table.
    """

    name: str
    data: str
    summary: str


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A model of the zoo, ready to be made.

    Attributes:
        name: of the model.
        make_model: a freshly initialised module; torch's seed decides the weights.
        task: what it is trained for.
        input_shape: shape of one sample.
    """

    name: str
    make_model: Callable[[], nn.Module]
    task: Task
    input_shape: tuple[int, ...]


_ENTRIES = (
    ZooEntry("watch_cnn1d", "smartwatch", "gestures from a smartwatch, three 1D convolutions"),
    ZooEntry("tiny_transformer", "smartwatch", "gestures from a smartwatch, a transformer over patches"),
    ZooEntry(
        "watch_autoencoder", "smartwatch", "anomaly score of a smartwatch window, learns without labels"
    ),
    ZooEntry("fashion_cnn", "fashion-mnist", "clothes in 28 × 28 pixels, two convolutions"),
    ZooEntry(
        "fashion_mobile", "fashion-mnist", "clothes in 28 × 28 pixels, depthwise separable convolutions"
    ),
    ZooEntry("digits_mlp", "digits", "digits in 8 × 8 pixels, three linear layers"),
)

ZOO: Mapping[str, ZooEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def load(name: str) -> ZooModel:
    """Import a model's file.

    Raises:
        ConfigurationError: the zoo has no such model; the hint names the nearest, or all.
    """
    if name not in ZOO:
        near = get_close_matches(name, ZOO, n=1) or sorted(ZOO)
        raise ConfigurationError(f"the zoo has no model {name!r}", hint=f"try {', '.join(near)}", model=name)
    module = import_module(f"models.zoo.{name}")
    return ZooModel(name, module.make_model, module.TASK, module.INPUT_SHAPE)
