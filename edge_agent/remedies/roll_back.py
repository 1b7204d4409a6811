"""Goes back to the last good release, when the watch over a new one condemns it (`edge_agent/release/watch.py`).

Only while it is on probation: once confirmed, going back to an older release takes a signature (law 5).
"""

from __future__ import annotations

from edge_agent.checks import model
from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import Prescription

NAME = "roll_back"


def prescribe(facts: Facts, limits: HealthSettings) -> Prescription | None:
    if not facts.is_on_probation or not facts.watched:
        return None
    return Prescription(NAME, model.NAME, facts.watched)
