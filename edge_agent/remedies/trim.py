"""Makes room on a disk that runs full, by what can be had again: half-downloaded releases, a self-test that was cut
off, the write-ahead log. Updates, samples and the three model slots are never touched; samples have a cap of their own.
"""

from __future__ import annotations

from edge_agent.checks import disk
from edge_agent.checks.facts import Facts
from edge_agent.settings import HealthSettings
from process.health import Prescription

NAME = "trim"


def prescribe(facts: Facts, limits: HealthSettings) -> Prescription | None:
    if facts.free_bytes is None or facts.free_bytes >= limits.min_free_bytes:
        return None
    return Prescription(NAME, disk.NAME, f"{facts.free_bytes // 2**20} MiB free")
