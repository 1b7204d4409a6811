"""Asks for a release check now, which renews the certificate, when that should have been renewed long ago."""

from __future__ import annotations

from edge_agent.checks import certificate
from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import Prescription

NAME = "renew"


def prescribe(facts: Facts, limits: HealthSettings) -> Prescription | None:
    if facts.certificate_seconds is None or not certificate.is_late(facts):
        return None
    return Prescription(NAME, certificate.NAME, f"{facts.certificate_seconds / 3600.0:.0f} hours are left")
