"""Data of `models.thirds` for tests of real processes."""

from __future__ import annotations

import numpy as np

from models.data.federation import Federation, Split
from models.thirds import FEATURES, LABELS, draw


def make_federation(*devices: str) -> Federation:
    """Windows for these devices and for the operator."""
    rng = np.random.default_rng(7)
    splits = {device: _split(rng) for device in devices}
    return Federation("thirds", LABELS, (FEATURES,), _split(rng), splits)


def _split(rng: np.random.Generator) -> Split:
    return Split(*draw(rng, 24), *draw(rng, 8), *draw(rng, 16))
