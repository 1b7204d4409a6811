"""Makes room on a disk that runs full, by what can be had again: what a crash left of imports, and the database's
write-ahead log. Updates, heads, releases and the books are never touched.
"""

from __future__ import annotations

from cloud_server.checks import disk
from cloud_server.checks.facts import Facts
from cloud_server.settings import HealthSettings
from process.health import Prescription

NAME = "trim"


def prescribe(facts: Facts, limits: HealthSettings) -> Prescription | None:
    if facts.free_bytes is None or facts.free_bytes >= limits.min_free_bytes:
        return None
    return Prescription(NAME, disk.NAME, f"{facts.free_bytes // 2**20} MiB free")
