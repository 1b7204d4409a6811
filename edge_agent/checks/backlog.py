"""The backlog: updates that wait for their receipts. At the outbox's cap the oldest is given up."""

from __future__ import annotations

from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import Finding

NAME = "backlog"
_FULL_SHARE = 0.8


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Warns above `max_owed` updates, or near the outbox's cap; fails at both."""
    if facts.owed is None:
        return Finding(NAME, "ok", "not known")
    detail = f"{facts.owed} updates owed, {facts.owed_bytes // 1024} KiB"
    is_many = facts.owed > limits.max_owed
    is_full = 0 < _FULL_SHARE * facts.owed_limit_bytes < facts.owed_bytes
    if not is_many and not is_full:
        return Finding(NAME, "ok", detail)
    return Finding(
        NAME,
        "fail" if is_many and is_full else "warn",
        detail,
        "updates wait for receipts: is the aggregator running?",
    )
