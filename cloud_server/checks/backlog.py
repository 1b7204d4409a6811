"""The backlog: events that wait for the loop, and messages that did not fit. Nothing is lost: devices send again."""

from __future__ import annotations

from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import Finding

NAME = "backlog"
_HIGH_SHARE = 0.5
_HINT = (
    "the aggregator or the broker is too slow for the fleet: see its processor, and report.telemetry_seconds"
)


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails when messages were dropped since the look before; warns when a queue is half full."""
    if facts.waiting_share is None:
        return Finding(NAME, "ok", f"{facts.stored} updates wait for the fold")
    detail = f"{facts.waiting_share:.0%} of the queue taken, {facts.stored} updates wait for the fold"
    if facts.dropped:
        return Finding(NAME, "fail", f"{facts.dropped} messages did not fit; {detail}", _HINT)
    return Finding(NAME, "warn" if facts.waiting_share > _HIGH_SHARE else "ok", detail, _HINT)
