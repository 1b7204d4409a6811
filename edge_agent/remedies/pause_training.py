"""Stops training and declines further orders to train, while the machine is too hot or its disk is full.

Once paused it stays so until the reason is gone for good (heat falls by `heat.WARM_CELSIUS`) and for at least
`health.remedy_seconds`, so that it does not flutter. Answers go on.
"""

from __future__ import annotations

from edge_agent.checks import disk, heat
from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import Prescription

NAME = "pause_training"


def prescribe(facts: Facts, limits: HealthSettings) -> Prescription | None:
    """Wants to pause, or to stay paused."""
    limit = limits.max_celsius - (heat.WARM_CELSIUS if facts.is_training_paused else 0.0)
    if facts.celsius is not None and facts.celsius >= limit:
        return Prescription(NAME, heat.NAME, f"{facts.celsius:.0f} °C")
    if disk.judge(facts, limits).level == "fail":
        return Prescription(NAME, disk.NAME, disk.judge(facts, limits).detail)
    if facts.is_training_paused and facts.paused_seconds < limits.remedy_seconds:
        return Prescription(NAME, heat.NAME, "it was paused a moment ago")
    return None
