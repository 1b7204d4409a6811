"""Fashion-MNIST on 20 devices, Dirichlet 0.3, 30 rounds; takes a quarter of an hour, so only by name."""

from __future__ import annotations

from bench.learning import learning_rows
from bench.table import Row


def measure() -> list[Row]:
    """Rows for one seed."""
    return learning_rows("fashion-mnist", rounds=30, seeds=(1,), goal=0.87, gain_goal=None)
