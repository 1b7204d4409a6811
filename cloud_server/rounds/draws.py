"""Everything random in a round, drawn from the run's secret seed: the same seed gives the same run.

Laws of the file: pure; every draw has its own label, so that adding one changes no other. Who does not know
the seed can predict nothing (SHA-256).
"""

from __future__ import annotations

import hashlib


def draw_bytes(seed: int, *labels: str | int) -> bytes:
    """32 bytes for a label."""
    text = "\0".join(str(part) for part in (seed, *labels))
    return hashlib.sha256(b"shoal round draw\0" + text.encode()).digest()


def draw_seed(seed: int, *labels: str | int) -> int:
    """A number from 0 to 2**63 − 1 for a label."""
    return int.from_bytes(draw_bytes(seed, *labels)[:8], "big") >> 1


def order_id(seed: int, round_number: int, kind: str, device: str) -> bytes:
    """The 16 bytes that name an order."""
    return draw_bytes(seed, "order", round_number, kind, device)[:16]
