"""The model: whether there is one, whether it answers, and what the watch over a new release says."""

from __future__ import annotations

from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import Finding

NAME = "model"


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails when no request of the last look was answered, or the watch condemns a new release."""
    if facts.model_trouble:
        return Finding(NAME, "fail", facts.model_trouble, "the next release check brings it whole")
    if not facts.release_version:
        return Finding(NAME, "warn", "no release is installed yet", "it comes while the agent runs")
    what = facts.model_detail or f"release {facts.release_version} serves"
    if facts.watched:
        return Finding(NAME, "fail", f"{what}; {facts.watched}", "the log of the aggregator's gate says more")
    if facts.errors:
        return Finding(
            NAME,
            "fail" if facts.errors >= facts.requests else "warn",
            f"{what}; {facts.errors} of {facts.requests} requests failed",
            "shoal-cloud release rollback",
        )
    return Finding(NAME, "ok", f"{what}, on probation" if facts.is_on_probation else what)
