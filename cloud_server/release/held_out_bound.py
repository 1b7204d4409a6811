"""How a head does on the operator's held-out data against the base that it came from: what a round must not lose.

Laws of the file: float32, as heads are trained (only a release is judged by its int8 file); each head is measured
once. Source: DESIGN.md (Training head and release are two things).
"""

from __future__ import annotations

import math

from cloud_server.release.releaser import Holdout
from models.bundle import Bundle
from models.evaluate import evaluate
from wire.checkpoint import Checkpoint
from wire.errors import ModelError
from wire.manifest import FLOAT32
from wire.materialize import materialize_float32


class HeldOutBound:
    """`cloud_server.rounds.ports.HeldOut` over a bundle's float32 graph."""

    def __init__(self, bundle: Bundle, holdout: Holdout) -> None:
        self._manifest = bundle.manifest
        self._graph = bundle.read(FLOAT32)
        self._holdout = holdout
        self._known: dict[bytes, float] = {}

    def loss_of(self, base: Checkpoint, head: Checkpoint) -> float:
        """How much worse the head is than its base; negative where it is better.

        Raises:
            ModelError: an answer of the head is not finite.
        """
        before, after = self._metric(base), self._metric(head)
        # A head that is rejected is not asked for again; one that is not is the next base.
        self._known = {base.sha256: before, head.sha256: after}
        return before - after if self._manifest.task.higher_is_better else after - before

    def _metric(self, head: Checkpoint) -> float:
        if head.sha256 in self._known:
            return self._known[head.sha256]
        graph = materialize_float32(self._graph, self._manifest, head)
        metric = evaluate(graph, self._manifest.task, self._holdout.x, self._holdout.y).metric
        if not math.isfinite(metric):
            raise ModelError(f"the head's metric on held-out data is {metric}")
        return metric
