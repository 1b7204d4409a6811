"""The broker: whether messages go out and come back. A device that is away answers, and keeps what it owes."""

from __future__ import annotations

from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import Finding

NAME = "broker"
FRUITLESS_SENDS = 5
"""Sends of one update over one connection: more than five minutes without a receipt (`network.receipt_seconds`)."""
_HINT = "is the broker running, and is its port open from here?"


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails when it cannot be reached, and warns when nothing comes back over a connection that stands."""
    if facts.broker_trouble:
        return Finding(NAME, "fail", facts.broker_trouble, _HINT)
    if facts.is_connected is None:
        return Finding(NAME, "ok", facts.broker_detail or "not known")
    if not facts.is_connected:
        detail = f"not connected for {facts.away_seconds:.0f} s"
        return Finding(NAME, "fail" if facts.away_seconds > limits.away_seconds else "warn", detail, _HINT)
    if facts.fruitless_sends >= FRUITLESS_SENDS:
        return Finding(
            NAME,
            "warn",
            f"connected, but an update was sent {facts.fruitless_sends} times without a receipt",
            "is the aggregator running? `shoal-cloud check` says",
        )
    return Finding(NAME, "ok", "connected")
