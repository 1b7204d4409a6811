"""The database: whether it answers, and whether this service is still the one that may write."""

from __future__ import annotations

from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import Finding

NAME = "database"


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails when it does not answer, or somebody else writes to it."""
    if facts.database_trouble:
        return Finding(NAME, "fail", facts.database_trouble, "no receipt leaves before it answers again")
    if facts.is_fenced_off:
        return Finding(
            NAME,
            "fail",
            "another service has claimed the database",
            "stop this one: only one of them can commit",
        )
    return Finding(NAME, "ok", "answers")
