"""What FLTrust measures devices against: where the operator's own clean samples lead from a base.

That is two directions, added up at one length. Training as devices train (the paper's way) is long, and of samples
that the first release was trained on it mostly finds what is theirs alone; the slope of their loss at the base
(the paper's way with a single step) is right as soon as the fleet has moved the head away from them, and says little
before. Law of the file: what comes of the same base and seed is the same on one device. Source: Cao et al., "FLTrust",
arXiv:2012.13995.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cloud_server.refine.refinement import RefineConfig, Refinery, Vector
from wire.checkpoint import Checkpoint
from wire.messages import TrainConfig


def reference_config(train: TrainConfig) -> RefineConfig:
    """The operator's training as that of a device."""
    return RefineConfig(
        optimizer=train.optimizer,
        epochs=train.epochs,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        max_change=train.clipping_norm,
        is_mixed=False,
    )


def reference_of(refinery: Refinery) -> Callable[[Checkpoint, int], Vector]:
    """Where the samples lead from a base, by a seed: parameters float32 [P]."""

    def lead(base: Checkpoint, seed: int) -> Vector:
        trained = refinery.refine(base.params, base.buffers, seed).params - base.params
        descent = refinery.descent(base.params, base.buffers)
        length, slope = float(np.linalg.norm(trained)), float(np.linalg.norm(descent))
        if math.isfinite(slope) and slope > 0.0:
            trained = trained + np.float32((length or 1.0) / slope) * descent
        led: Vector = (base.params + trained).astype(np.float32)
        return led

    return lead
