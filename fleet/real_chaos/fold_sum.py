"""A run's head once more, as the sum of all that was folded into it: in float64, with none of the product's folds.

Laws of the file: the run averages (FedAvg); what the newest step's code left out is part of the sum, as it is owed; so
an update that is folded twice, or left out, or folded with another weight, shows as a difference. Source:
docs/architecture.md ("Round"); fleet/chaos/fold_check.py checks each step of a simulated run.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fleet.chaos.fold_check import Made, mean, owed
from wire.checkpoint import Checkpoint
from wire.messages import Update

TOLERANCE = 1e-4
"""Of the largest parameter; a round's rounding to float32 is 6e-8 of it, and a run has thousands of them."""


def check_sum(
    reader: sqlite3.Connection, folded: Mapping[int, Sequence[Update]], blob: Callable[[str], bytes]
) -> str:
    """What is wrong with the newest head; empty when nothing is.

    Args:
        folded: the updates of each round, as devices made them.
        blob: an artefact by its SHA-256 (hex).
    """
    head = reader.execute(
        "SELECT round, sha256, residual_key FROM checkpoints ORDER BY round DESC LIMIT 1"
    ).fetchone()
    first = reader.execute("SELECT sha256 FROM checkpoints WHERE round = 0").fetchone()
    if head is None or head[0] == 0 or first is None:
        return "" if not folded else "did not move, and updates are folded"
    wanted = Checkpoint.from_bytes(blob(first[0])).params.astype(np.float64)
    for number, config, state in reader.execute("SELECT number, config, state FROM rounds ORDER BY number"):
        replies = folded.get(number, ())
        if state == "done" and not replies:
            return f"moved in round {number}, of which nothing is folded"
        if replies:
            plain = json.loads(config)
            bound = min(plain.get("norm_bound", float("inf")), plain["train"]["clipping_norm"])
            wanted += mean([Made(each, 0) for each in replies], bound)
    params = Checkpoint.from_bytes(blob(head[1])).params.astype(np.float64)
    if head[2]:
        params += owed(blob(head[2]), params.size)
    error = float(np.abs(params - wanted).max())
    scale = max(1.0, float(np.abs(wanted).max()))
    return "" if error <= TOLERANCE * scale else f"is off the sum of its updates by {error:.3g}"
