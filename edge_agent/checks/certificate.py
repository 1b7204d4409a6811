"""The certificate that the broker and the aggregator's HTTPS port ask for, with the rest of the identity; it is renewed
at two thirds of its life."""

from __future__ import annotations

from edge_agent.checks.facts import Facts
from edge_agent.enrolment.identity import NOT_ENROLLED_HINT
from edge_agent.settings import HealthSettings
from process.health import Finding

NAME = "certificate"
_DAY = 86_400.0
_LATE_SHARE = 0.2
"""Of a life: an agent that reaches its aggregator has renewed long before so little is left."""


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails without an identity and once it has ended; warns when it should have been renewed and was not."""
    if facts.identity_trouble:
        return Finding(NAME, "fail", facts.identity_trouble, NOT_ENROLLED_HINT)
    left = facts.certificate_seconds
    if left is None:
        return Finding(NAME, "ok", "not known")
    if left <= 0:
        return Finding(
            NAME,
            "fail",
            f"expired {-left / _DAY:.1f} days ago",
            "start the agent: it renews by its update key, unless the device was away for too long",
        )
    detail = f"valid for {left / _DAY:.1f} days"
    if is_late(facts):
        return Finding(
            NAME, "warn", detail, "it renews itself while the agent runs and reaches the aggregator"
        )
    return Finding(NAME, "ok", detail)


def is_late(facts: Facts) -> bool:
    """Whether it ends soon."""
    left, life = facts.certificate_seconds, facts.certificate_life_seconds
    return left is not None and left < (_LATE_SHARE * life if life else 2 * _DAY)
