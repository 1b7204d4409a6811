"""From a round's head to a release or a hold: quantize, measure, ask the gate, publish.

Laws of the file: what is judged is what would be served (the int8 file with fresh ranges); the candidate and the
release that devices serve are compared on the same windows of the same devices in one evaluation (`served_…` metrics),
and on the same held-out data of the operator; asked again for a round (after a crash), it gives the first answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cloud_server.db.releases import HELD, RELEASED, ReleaseRow
from cloud_server.refine.refinement import Refinery
from cloud_server.release.gate import SERVED, GatePolicy, Judged, Pair, judge
from cloud_server.release.publish import Publisher
from cloud_server.rounds.ports import Candidate, Decision, Measured, Vector
from models.candidate import Candidate as Made
from models.candidate import CandidateMaker
from models.evaluate import evaluate
from process.logs import get_logger
from wire.checkpoint import Checkpoint
from wire.manifest import Manifest

_log = get_logger("cloud.release")

Timed = Callable[[], AbstractContextManager[None]]
"""Makes a context around what takes long, for a metric."""


@dataclass(frozen=True, eq=False)
class Holdout:
    """The operator's own held-out data: x float32 [N, …], y int64 [N]."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]


class CalibratingFinisher:
    """Makes an aggregate a head: refined on the operator's data where that is wanted, with fresh activation ranges."""

    def __init__(
        self, maker: CandidateMaker, refinery: Refinery | None = None, timed: Timed = nullcontext
    ) -> None:
        self._maker = maker
        self._refinery = refinery
        self._timed = timed

    def refine(self, params: Vector, buffers: Vector, seed: int) -> Vector:
        """See `cloud_server.rounds.ports.Finisher`."""
        if self._refinery is None:
            return params
        with self._timed():
            refined = self._refinery.refine(params, buffers, seed)
        _log.info("head_refined", change=refined.change, was_cut=refined.was_cut)
        return refined.params

    def finish(self, params: Vector, buffers: Vector, base: Checkpoint) -> Checkpoint:
        """See `cloud_server.rounds.ports.Finisher`."""
        with self._timed():
            return self._maker.checkpoint(params, buffers)


class GatedReleaser:
    """The gate and all that follows it; `cloud_server.rounds.ports.Releaser`. (The `Announcer` tells the fleet.)

    Args:
        holdout: None where the operator has no labelled data; then the devices alone decide.
        timed: around every decision.
    """

    def __init__(
        self,
        *,
        publisher: Publisher,
        maker: CandidateMaker,
        manifest: Manifest,
        policy: GatePolicy,
        ring: str,
        holdout: Holdout | None,
        timed: Timed = nullcontext,
    ) -> None:
        self._publisher = publisher
        self._maker = maker
        self._manifest = manifest
        self._policy = policy
        self._ring = ring
        self._holdout = holdout
        self._timed = timed
        self._served: tuple[int, float | None] = (0, None)

    def decide(self, candidate: Candidate) -> Decision:
        """Releases the candidate or holds it back."""
        with self._timed():
            return self._decide(candidate)

    def _decide(self, candidate: Candidate) -> Decision:
        made = self._maker.fill(candidate.checkpoint)
        operator = self._measure(made.int8)
        metrics = dict(candidate.metrics)
        if operator is not None:
            metrics["operator_" + self._manifest.task.metric] = operator
        row = self._publisher.propose(
            made, run=candidate.run, round_number=candidate.round_number, metrics=metrics
        )
        if row.state == HELD:
            return Decision(reason=row.reason, metrics=metrics)
        if row.state != RELEASED:
            reason = self._judge(candidate, made, operator, row)
            if reason:
                self._publisher.hold(row.version, reason)
                _log.info("release_held", version=row.version, round=candidate.round_number, reason=reason)
                return Decision(reason=reason, metrics=metrics)
        self._publisher.publish(row.version, self._ring)
        self._served = (row.version, operator)
        _log.info("release_published", version=row.version, round=candidate.round_number, ring=self._ring)
        return Decision(release_version=row.version, metrics=metrics)

    def _judge(self, candidate: Candidate, made: Made, operator: float | None, row: ReleaseRow) -> str:
        """The gate's reason to hold back, or empty."""
        task = self._manifest.task
        examples = int(candidate.metrics.get("num_examples", 0))
        judged = Judged(
            federated=candidate.metrics.get(task.metric),
            federated_examples=examples,
            operator=operator,
            size_bytes=len(made.int8),
        )
        current = Judged(
            federated=_served(candidate.metrics, task.metric),
            federated_examples=examples,
            operator=self._operator_of_current(),
            size_bytes=0,
        )
        pairs = _pairs(candidate.measured, task.metric)
        verdict = judge(judged, current, self._policy, higher_is_better=task.higher_is_better, pairs=pairs)
        return "" if verdict.reason is None else str(verdict.reason)

    def _operator_of_current(self) -> float | None:
        """The operator's metric of the release that the ring runs, measured once."""
        if self._holdout is None:
            return None
        version = self._publisher.current_version(self._ring)
        if version == 0:
            return None
        if self._served[0] != version:
            made = self._maker.fill(self._publisher.checkpoint(version))
            self._served = (version, self._measure(made.int8))
        return self._served[1]

    def _measure(self, int8: bytes) -> float | None:
        if self._holdout is None:
            return None
        return evaluate(int8, self._manifest.task, self._holdout.x, self._holdout.y).metric


def _pairs(measured: Sequence[Measured], name: str) -> list[Pair]:
    """What devices measured with both models."""
    served = SERVED + name
    return [
        Pair(each.metrics[name], each.metrics[served], each.num_examples)
        for each in measured
        if name in each.metrics and served in each.metrics
    ]


def _served(metrics: Mapping[str, float], name: str) -> float | None:
    return metrics.get(SERVED + name)
