"""The smallest model that is worth federating: which third of twelve numbers has the largest sum. Histories under
faults play with it by the thousand, and tests where another model would add nothing.

Laws of the file: made by the real builder, always with the same weights; a bundle takes about a second.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.build import build_bundle
from models.bundle import Bundle
from models.data.federation import Floats, Labels
from models.task import Task

FEATURES = 12
LABELS = ("low", "middle", "high")


def make_bundle(folder: Path) -> Bundle:
    """Two linear layers, exported, quantized and written."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, len(LABELS)))
    x, _ = draw(np.random.default_rng(0), 64)
    task = Task.classification(len(LABELS))
    return build_bundle(module, task, (FEATURES,), x, name="thirds", labels=LABELS, out_dir=folder)


def draw(rng: np.random.Generator, count: int) -> tuple[Floats, Labels]:
    """Windows float32 [count, 12] and their labels int64 [count]."""
    x = rng.standard_normal((count, FEATURES)).astype(np.float32)
    return x, x.reshape(count, len(LABELS), -1).sum(axis=2).argmax(axis=1)
