"""What a device does about a finding by itself: one file a remedy, each a pure function from facts to a prescription.

Laws of the folder: a remedy only wants; `edge_agent/vitals/health.py` rations, carries out and tells; none of them
loses an update, stops an answer, or installs anything that was not signed.
"""

from __future__ import annotations

from edge_agent.checks.facts import Facts
from edge_agent.remedies import pause_training, reconnect, renew, roll_back, trim
from edge_agent.settings import HealthSettings
from process.health import Prescription

RATIONED = (trim, renew, reconnect)
"""Tried again less and less often. `roll_back` happens once a release; `pause_training` is a state: it holds as long as
there is reason for it."""


def prescribe(facts: Facts, limits: HealthSettings) -> tuple[Prescription, ...]:
    """What the remedies want, in the order in which it would be done."""
    wanted = [remedy.prescribe(facts, limits) for remedy in (roll_back, pause_training, *RATIONED)]
    return tuple(prescription for prescription in wanted if prescription is not None)
