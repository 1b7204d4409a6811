"""Leaves the broker and joins it again, when devices are present and yet none of them is heard.

A broker that lost our subscriptions answers pings for ever; joining subscribes anew.
"""

from __future__ import annotations

from cloud_server.checks import broker
from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import Prescription

NAME = "reconnect"


def prescribe(facts: Facts, limits: HealthSettings) -> Prescription | None:
    if not broker.is_silent(facts):
        return None
    return Prescription(NAME, broker.NAME, f"nothing heard for {facts.silent_seconds:.0f} s")
