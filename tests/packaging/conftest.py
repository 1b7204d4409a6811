"""The wheel, built from a copy of the tree; a fresh environment that has nothing but it; a small bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("wire", "process", "edge_agent", "models", "cloud_server", "fleet")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def clean_environment() -> dict[str, str]:
    """The environment without anything that would lead an interpreter to this tree."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves `build/` behind, and takes what an older build left there."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, env=clean_environment(), cwd=source)
    (built,) = out.glob("shoal-*.whl")
    return built


@pytest.fixture(scope="session")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the base install and nothing else, as the edge image has it: every file
    by its hash, and whole by the lock alone."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, env=clean_environment())
    binaries = folder / "bin"
    install = [str(binaries / "pip"), "install", "--quiet", "--no-deps"]
    lock = ["--require-hashes", "--requirement", str(ROOT / "deploy" / "locks" / "edge.txt")]
    for what in (lock, [str(wheel)]):
        subprocess.run([*install, *what], check=True, env=clean_environment(), cwd=folder)
    subprocess.run([str(binaries / "pip"), "check"], check=True, env=clean_environment(), cwd=folder)
    return binaries


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two linear layers, exported, quantized and written by the real builder."""
    import torch
    from torch import nn

    from models.build import build_bundle
    from models.task import Task

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    folder = tmp_path_factory.mktemp("bundle") / "thirds"
    return build_bundle(module, Task.classification(3), (8,), x, name="thirds", out_dir=folder)
