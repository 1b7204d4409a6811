"""What holds for every test: the process-wide logging is as the test found it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logging_as_found() -> Iterator[None]:
    """A command that runs inside a test sends the process's logs to a stderr that ends with that test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    # Chaos silences its process, also where a fixture of a whole module plays it.
    logging.disable(logging.NOTSET)
    yield
    logging.disable(logging.NOTSET)
    root.handlers[:] = handlers
    root.setLevel(level)
