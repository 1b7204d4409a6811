"""Room on the disk of the state folder: updates of a round, heads, releases and the books are written there."""

from __future__ import annotations

from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import Finding

NAME = "disk"
_FULL_SHARE = 8


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails when nothing can be written, or an eighth of `min_free_bytes` is left."""
    if facts.disk_trouble:
        return Finding(
            NAME, "fail", facts.disk_trouble, "run as the service's user, or change the folder's owner"
        )
    if facts.free_bytes is None:
        return Finding(NAME, "ok", "not known")
    detail = f"{facts.free_bytes // 2**20} MiB free"
    hint = f"free some, or move storage.artefacts: {limits.min_free_bytes // 2**20} MiB should be free"
    if facts.free_bytes < limits.min_free_bytes // _FULL_SHARE:
        return Finding(NAME, "fail", detail, hint)
    return Finding(NAME, "warn" if facts.free_bytes < limits.min_free_bytes else "ok", detail, hint)
