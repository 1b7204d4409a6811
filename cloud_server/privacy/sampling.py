"""What every private run does, whoever adds the noise: a Poisson-sampled cohort, a fixed clip, and nobody is measured.

Laws of the file: the cohort follows from the round's secret alone, never from what a strategy wants (no fewest, no
most); a strategy's own evaluation plan is not asked. Source: docs/how-to/privacy.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from fractions import Fraction

from cloud_server.privacy.budget import Budget
from cloud_server.rounds.ports import Aggregate, Measured, Plan, Replies, Strategy
from wire.checkpoint import Checkpoint


def sample_cohort(secret: bytes, node_ids: Iterable[int], rate: float) -> tuple[int, ...]:
    """Poisson sampling: each node with probability `rate`, whatever becomes of the others; nobody is legal.

    Args:
        secret: of the round; who does not know it cannot tell who was asked.
    """
    threshold = int(Fraction(rate) * 2**64)
    return tuple(node_id for node_id in sorted(node_ids) if _word(secret, node_id) < threshold)


class PrivateStrategy:
    """Wraps the strategy of a run; `cloud_server.rounds.ports.Strategy`.

    Where devices add the noise, what the strategy is given has it already.
    """

    def __init__(self, inner: Strategy, budget: Budget) -> None:
        self._inner = inner
        self._budget = budget

    def plan_train(self, round_number: int, base: Checkpoint, node_ids: Iterable[int], seed: int) -> Plan:
        """Draws the cohort of the round that the budget has prepared."""
        listed = list(node_ids)
        config = self._inner.plan_train(round_number, base, listed, seed).config
        plan = self._budget.plan
        cohort = sample_cohort(self._budget.opening.secret, listed, plan.sampling_rate)
        return Plan(cohort, {**config, "clipping_norm": plan.clipping_norm})

    def aggregate_train(self, round_number: int, base: Checkpoint, replies: Replies, seed: int) -> Aggregate:
        """The inner strategy's; raises `RoundError` as it does."""
        return self._inner.aggregate_train(round_number, base, replies, seed)

    def plan_evaluate(self, round_number: int, head: Checkpoint, node_ids: Iterable[int], seed: int) -> Plan:
        """Nobody: what devices measure on their own data would be told without noise."""
        return Plan((), {})

    def aggregate_evaluate(self, round_number: int, measured: list[Measured]) -> Mapping[str, float]:
        return {}

    def export_state(self) -> Mapping[str, bytes]:
        """The inner strategy's: it has seen noisy means only."""
        return self._inner.export_state()

    def import_state(self, state: Mapping[str, bytes]) -> None:
        self._inner.import_state(state)


def _word(secret: bytes, node_id: int) -> int:
    """A uniform number below 2**64 for a node."""
    digest = hashlib.sha256(b"shoal cohort\0" + secret + node_id.to_bytes(8, "big", signed=True)).digest()
    return int.from_bytes(digest[:8], "big")
