"""What the cloud does about a finding by itself: one file a remedy, each a pure function from facts to a prescription.

Laws of the folder: a remedy only wants; `cloud_server/health.py` rations, writes into the books and carries out; none
of them deletes what was acknowledged. Rolling a release back is not among them: that takes a ring's statement, and the
gate's numbers (`shoal-cloud release rollback`).
"""

from __future__ import annotations

from cloud_server.checks.facts import Facts
from cloud_server.remedies import pause_training, reconnect, renew, trim
from cloud_server.settings import HealthSettings
from process.health import Prescription

RATIONED = (trim, renew, reconnect)
"""Tried again less and less often; `pause_training` is a state, and holds as long as there is reason for it."""


def prescribe(facts: Facts, limits: HealthSettings) -> tuple[Prescription, ...]:
    """What the remedies want, in the order in which it would be done."""
    wanted = [remedy.prescribe(facts, limits) for remedy in (pause_training, *RATIONED)]
    return tuple(prescription for prescription in wanted if prescription is not None)
