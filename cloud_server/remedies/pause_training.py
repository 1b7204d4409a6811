"""Opens no further round while the disk is full: the updates of a round are kept until it is folded.

The round under way goes on to its end, which frees its updates. Once held it stays so for `health.remedy_seconds`, so
that it does not flutter; what an operator paused stays paused.
"""

from __future__ import annotations

from cloud_server.checks import disk
from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import Prescription

NAME = "pause_training"


def prescribe(facts: Facts, limits: HealthSettings) -> Prescription | None:
    """Wants to hold, or to go on holding."""
    finding = disk.judge(facts, limits)
    if finding.level == "fail" or (facts.is_held and finding.level == "warn"):
        return Prescription(NAME, disk.NAME, finding.detail)
    if facts.is_held and facts.held_seconds < limits.remedy_seconds:
        return Prescription(NAME, disk.NAME, "it was paused a moment ago")
    return None
