"""Leaves the broker and joins it again, when updates leave over a connection that stands and no receipt comes back.

A broker that lost our subscriptions, or gave our session to nobody, answers pings for ever; joining subscribes anew.
"""

from __future__ import annotations

from edge_agent.checks import broker
from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import Prescription

NAME = "reconnect"


def prescribe(facts: Facts, limits: HealthSettings) -> Prescription | None:
    if not facts.is_connected or facts.fruitless_sends < broker.FRUITLESS_SENDS:
        return None
    return Prescription(NAME, broker.NAME, f"{facts.fruitless_sends} sends without a receipt")
