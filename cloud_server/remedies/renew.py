"""Makes certificates of our servers anew, a tenth of their life before their end, and shows them from the next
connection on. Signatures of release metadata are renewed at half of their life (`release/tuf_repository.py`).
"""

from __future__ import annotations

from cloud_server.checks import certificate
from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import Prescription

NAME = "renew"


def prescribe(facts: Facts, limits: HealthSettings) -> Prescription | None:
    if not facts.renewable:
        return None
    return Prescription(NAME, certificate.NAME, f"{', '.join(sorted(facts.renewable))} ends soon")
