"""One small bundle for all edge tests: two linear layers, exported and quantized by the real builder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from models.bundle import Bundle
from tests.edge.aggregator import Aggregator, open_aggregator
from tests.edge.lab import Lab


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    import torch
    from torch import nn

    from models.build import build_bundle
    from models.task import Task

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    x = np.random.default_rng(0).standard_normal((64, 12)).astype(np.float32)
    folder = tmp_path_factory.mktemp("bundle") / "thirds"
    return build_bundle(module, Task.classification(3), (12,), x, name="thirds", out_dir=folder)


@pytest.fixture
def lab(bundle: Bundle, tmp_path: Path) -> Lab:
    """A fleet with release 1 published."""
    lab = Lab(bundle, tmp_path)
    lab.cloud.release(lab.cloud.candidate(), 1, announce=False)
    lab.settle()
    return lab


@pytest.fixture(scope="session")
def aggregator(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aggregator]:
    with open_aggregator(bundle, tmp_path_factory.mktemp("aggregator")) as opened:
        yield opened
