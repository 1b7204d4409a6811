"""What is looked at on a device: one file a check, each a pure function from facts to a finding.

Law of the folder: a check has no clock, disk or socket; what it must know stands in `facts.py`, and what it allows in
the settings (`[health]`).
"""

from __future__ import annotations

from edge_agent.checks import backlog, broker, certificate, clock, disk, heat, model
from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import Finding

CHECKS = (disk, clock, certificate, broker, model, heat, backlog)


def judge_all(facts: Facts, limits: HealthSettings) -> tuple[Finding, ...]:
    """The finding of every check, in the order in which one would look."""
    return tuple(check.judge(facts, limits) for check in CHECKS)
