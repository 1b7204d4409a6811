"""The time by a device's own clock, beside a heartbeat: envelope extension −1 (docs/protocol.md, clause 5.9).

Law of the file: what a device says is evidence among others, never the time; a value that is none is no error, since an
extension below zero may be ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

CLOCK_EXTENSION: Final = -1
_BYTES: Final = 8


def clock_extension(now: float) -> dict[int, bytes]:
    """Extensions that say `now` (unix seconds, not below 0)."""
    return {CLOCK_EXTENSION: max(0, int(now)).to_bytes(_BYTES, "big")}


def told_clock(extensions: Mapping[int, bytes]) -> float | None:
    """The sender's clock in unix seconds; None where it says nothing."""
    told = extensions.get(CLOCK_EXTENSION, b"")
    return float(int.from_bytes(told, "big")) if len(told) == _BYTES else None
