"""The machine's clock: messages and certificates expire by it; a device that knows better counts from its floor."""

from __future__ import annotations

from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import Finding

NAME = "clock"
SKEW_SECONDS = 60.0
_HINT = "set the clock (NTP): messages and certificates expire by it"


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails when it differs from the aggregator's; warns when it is behind what the aggregator signed."""
    if facts.skew_seconds is not None:
        if abs(facts.skew_seconds) > SKEW_SECONDS:
            return Finding(
                NAME,
                "fail",
                f"this clock is {facts.skew_seconds:+.0f} seconds off the aggregator's",
                _HINT,
            )
        return Finding(NAME, "ok", f"agrees with the aggregator's within {abs(facts.skew_seconds):.0f} s")
    if facts.behind_seconds > SKEW_SECONDS:
        return Finding(
            NAME, "warn", f"{facts.behind_seconds:.0f} seconds behind what the aggregator signed", _HINT
        )
    return Finding(NAME, "ok", "not behind what the aggregator signed")
