"""Certificates of the servers, the authority, and signatures of release metadata: what devices trust ends some day."""

from __future__ import annotations

from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import Finding

NAME = "certificate"
_DAY = 86_400.0
AUTHORITY_DAYS = 365.0
"""Devices must hear of a new authority, and take certificates of it, before the old one ends."""


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails once something has ended; warns when something should have been renewed."""
    if facts.certificate_trouble:
        return Finding(NAME, "fail", facts.certificate_trouble, "restore it from the newest backup")
    ended = [name for name, left in (*facts.certificates.items(), *facts.signatures.items()) if left <= 0]
    if ended:
        return Finding(NAME, "fail", f"ended: {', '.join(sorted(ended))}", "shoal-cloud keys expiry")
    late = sorted(facts.renewable)
    if late:
        return Finding(NAME, "warn", f"ends soon: {', '.join(late)}", "the running service makes it anew")
    if facts.signatures_due:
        due = ", ".join(sorted(facts.signatures_due))
        return Finding(NAME, "warn", f"the signature ends soon: {due}", "shoal-cloud keys expiry")
    authority = facts.certificates.get("ca")
    if authority is not None and authority < AUTHORITY_DAYS * _DAY:
        return Finding(
            NAME, "warn", f"the authority ends in {authority / _DAY:.0f} days", "docs/how-to/keys.md"
        )
    known = (*facts.certificates.values(), *facts.signatures.values())
    return Finding(NAME, "ok", f"valid for {min(known) / _DAY:.1f} days at least" if known else "not known")
