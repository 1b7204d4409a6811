"""A tiny model and its data for tests of real processes: which third of twelve numbers is the largest in sum."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.bundle import Bundle
from models.data.federation import Federation, Split

FEATURES = 12
LABELS = ("low", "middle", "high")


def make_bundle(folder: Path) -> Bundle:
    """Two linear layers, exported, quantized and written by the real builder."""
    import torch
    from torch import nn

    from models.build import build_bundle
    from models.task import Task

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, len(LABELS)))
    x, _ = draw(np.random.default_rng(0), 64)
    return build_bundle(
        module, Task.classification(len(LABELS)), (FEATURES,), x, name="thirds", labels=LABELS, out_dir=folder
    )


def make_federation(*devices: str) -> Federation:
    """Windows for these devices and for the operator."""
    rng = np.random.default_rng(7)
    splits = {device: _split(rng) for device in devices}
    return Federation("thirds", LABELS, (FEATURES,), _split(rng), splits)


def draw(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows float32 [count, 12] and their labels int64 [count]."""
    x = rng.standard_normal((count, FEATURES)).astype(np.float32)
    return x, x.reshape(count, len(LABELS), -1).sum(axis=2).argmax(axis=1)


def _split(rng: np.random.Generator) -> Split:
    return Split(*draw(rng, 24), *draw(rng, 8), *draw(rng, 16))
