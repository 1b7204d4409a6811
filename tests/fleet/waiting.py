"""Waiting for real processes: polls a condition; the limit is only there so that a broken build ends."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_SECONDS = 180.0


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Returns when `condition` holds."""
    until = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < until, f"waited too long for {what}"
        time.sleep(0.05)
