"""Fixtures of the aggregator's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cloud_server.cli import main
from models.bundle import Bundle
from tests.cloud.deployment import Deployment, open_deployment


@pytest.fixture(scope="session")
def real_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that runs, of a user's own module: one linear layer over four numbers, three classes."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "linear_model.py").write_text(
        "from torch import nn\n\n\ndef make_model() -> nn.Module:\n    return nn.Sequential(nn.Linear(4, 3))\n"
    )
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 120)
    x = (np.eye(4)[y] * 3 + rng.standard_normal((120, 4))).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=y)
    words = [
        "model",
        "build",
        "linear_model:make_model",
        "--data",
        str(folder / "data.npz"),
        "--path",
        str(folder),
    ]
    assert main([*words, "--name", "small", "--labels", "a,b,c", "--out", str(folder / "bundle")]) == 0
    return Bundle.open(folder / "bundle")


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with open_deployment(tmp_path) as opened:
        yield opened
