"""Heat: a machine that throttles answers late, and training is what can wait."""

from __future__ import annotations

from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import Finding

NAME = "heat"
WARM_CELSIUS = 10.0
"""So far below `health.max_celsius` it is warm, and training may begin again."""


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails at `max_celsius`."""
    if facts.celsius is None:
        return Finding(NAME, "ok", "no sensor")
    detail = f"{facts.celsius:.0f} °C"
    if facts.celsius >= limits.max_celsius:
        return Finding(NAME, "fail", detail, "cool the machine; training waits meanwhile")
    if facts.celsius > limits.max_celsius - WARM_CELSIUS:
        return Finding(NAME, "warn", detail, f"at {limits.max_celsius:.0f} °C training is paused")
    return Finding(NAME, "ok", detail)
