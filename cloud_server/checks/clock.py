"""The clock: signatures, certificates and deadlines are made by it. A clock that went back shows in the books."""

from __future__ import annotations

from cloud_server.checks.facts import Facts
from cloud_server.clock_evidence import HINT
from cloud_server.settings import HealthSettings
from process.health import Finding

NAME = "clock"
BEHIND_SECONDS = 60.0


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails when the clock cannot be right, or the newest entry of the books is from the future."""
    if facts.clock_trouble:
        return Finding(NAME, "fail", facts.clock_trouble, HINT)
    if facts.behind_seconds > BEHIND_SECONDS:
        return Finding(
            NAME,
            "fail",
            f"{facts.behind_seconds:.0f} seconds behind the newest entry of the books",
            "set the clock (NTP): what is signed now may be older than what devices know",
        )
    return Finding(NAME, "ok", "not behind the books")
