"""The first bundles for all tests of this folder: building and verifying one takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import thirds
from models.bundle import Bundle
from models.data import smartwatch
from models.first_bundle import make_first_bundle


@pytest.fixture(scope="session")
def watch_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("first") / "bundle"
    return make_first_bundle(smartwatch.federation(), "watch_cnn1d", folder, seed=1)


@pytest.fixture(scope="session")
def thirds_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return thirds.make_bundle(tmp_path_factory.mktemp("thirds") / "bundle")
