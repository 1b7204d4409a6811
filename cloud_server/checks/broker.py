"""The broker: whether messages come and go. Without it devices keep what they owe, and answer."""

from __future__ import annotations

from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import Finding

NAME = "broker"
_HINT = "is it running, and does it let the aggregator in? `shoal-cloud broker config` writes its files"


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails when it cannot be reached; warns when every device that is present fell silent at once."""
    if facts.broker_trouble:
        return Finding(NAME, "fail", facts.broker_trouble, _HINT)
    if facts.is_connected is None:
        return Finding(NAME, "ok", facts.broker_detail or "not known")
    if not facts.is_connected:
        detail = f"not connected for {facts.away_seconds:.0f} s"
        return Finding(NAME, "fail" if facts.away_seconds > limits.away_seconds else "warn", detail, _HINT)
    if is_silent(facts):
        return Finding(
            NAME,
            "warn",
            f"{facts.present} devices are present, and none was heard for {facts.silent_seconds:.0f} s",
            "look at the broker's log: does it deliver to the aggregator?",
        )
    return Finding(NAME, "ok", f"connected, {facts.present} devices present")


def is_silent(facts: Facts) -> bool:
    """Whether a connection that stands brings nothing, though it should."""
    return bool(facts.is_connected and facts.present and facts.silent_seconds > facts.quiet_seconds)
