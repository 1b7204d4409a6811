"""What is looked at in the cloud: one file a check, each a pure function from facts to a finding.

Law of the folder: a check has no clock, disk or socket; what it must know stands in `facts.py`, and what it allows in
the settings (`[health]`).
"""

from __future__ import annotations

from cloud_server.checks import backlog, broker, certificate, clock, database, disk, model
from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import Finding

CHECKS = (disk, clock, database, certificate, broker, model, backlog)


def judge_all(facts: Facts, limits: HealthSettings) -> tuple[Finding, ...]:
    """The finding of every check, in the order in which one would look."""
    return tuple(check.judge(facts, limits) for check in CHECKS)
