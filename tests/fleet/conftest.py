"""One first bundle for all tests of this folder: building and verifying it takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.bundle import Bundle
from models.data import smartwatch
from models.first_bundle import make_first_bundle


@pytest.fixture(scope="session")
def watch_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("first") / "bundle"
    return make_first_bundle(smartwatch.federation(), "watch_cnn1d", folder, seed=1)
