"""Room on the disk of the state folder: updates of a round, heads, releases and the books are written there."""

from __future__ import annotations

from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import DISK, Finding, judge_room

NAME = DISK


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails when nothing can be written, or an eighth of `min_free_bytes` is left."""
    return judge_room(
        facts.free_bytes,
        limits.min_free_bytes,
        facts.disk_trouble,
        hint=f"free some, or move storage.artefacts: {limits.min_free_bytes // 2**20} MiB should be free",
        trouble_hint="run as the service's user, or change the folder's owner",
    )
