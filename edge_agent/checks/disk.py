"""Room on the disk of the state folder: without it no update is stored and no release installed; answers go on."""

from __future__ import annotations

from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import DISK, Finding, judge_room

NAME = DISK


def judge(facts: Facts, limits: HealthSettings) -> Finding:
    """Fails when nothing can be written, or an eighth of `min_free_bytes` is left."""
    return judge_room(
        facts.free_bytes,
        limits.min_free_bytes,
        facts.disk_trouble,
        hint=f"free some: {limits.min_free_bytes // 2**20} MiB are needed for a release",
        trouble_hint="run as the agent's user, or change the folder's owner",
    )
