"""What FLTrust measures devices against: the operator's own clean samples, trained on as devices train.

Law of the file: what comes of the same base and seed is the same on one device. Source: Cao et al., "FLTrust",
arXiv:2012.13995.
"""

from __future__ import annotations

from collections.abc import Callable

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
    """Trains from a base by a seed; gives the parameters that come of it, float32 [P]."""
    return lambda base, seed: refinery.refine(base.params, base.buffers, seed).params
