"""What operators see, as plain values.

Law of the file: reads only; no secret (a run's seed, a token's hash) and no operator's pseudonym leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloud_server.db.audit import load_audit, newest_entry
from cloud_server.db.devices import DeviceRow, PresenceRow
from cloud_server.db.engine import Connection
from cloud_server.db.operators import OperatorRow
from cloud_server.db.releases import ReleaseRow, load_releases, load_rollouts
from cloud_server.deployment import Deployment
from wire.agent_versions import is_new_enough


def devices(deployment: Deployment) -> list[dict[str, Any]]:
    """Every device, by name."""
    presence = deployment.registry.presence()
    least = deployment.settings.enrolment.min_agent_version
    return [_device(row, presence, least) for row in deployment.registry.devices()]


def device(deployment: Deployment, name: str) -> dict[str, Any]:
    """One device; raises like `Registry.show`."""
    least = deployment.settings.enrolment.min_agent_version
    return _device(deployment.registry.show(name), deployment.registry.presence(), least)


def releases(connection: Connection) -> list[dict[str, Any]]:
    """Every release and candidate, oldest first, with the rings that run it."""
    rings = {row.ring: row.release_version for row in load_rollouts(connection)}
    return [_release(row, rings) for row in load_releases(connection)]


def audit_entries(connection: Connection, *, last: int, kind: str = "") -> list[dict[str, Any]]:
    """The newest entries of the audit chain, oldest first."""
    newest = newest_entry(connection)
    if newest is None:
        return []
    found = list(load_audit(connection, after=0 if kind else newest.seq - last, kind=kind))[-last:]
    return [{"entry": row.seq, "at": row.at, "kind": row.kind, "facts": dict(row.facts)} for row in found]


def operator(row: OperatorRow) -> dict[str, Any]:
    """One operator."""
    return {"name": row.name, "role": row.role, "created": row.created, "last_seen": row.last_seen}


def _device(row: DeviceRow, presence: Mapping[str, PresenceRow], least: str) -> dict[str, Any]:
    seen = presence.get(row.device)
    return {
        "device": row.device,
        "label": row.label,
        "status": row.status,
        "reason": row.reason,
        "ring": row.ring,
        "strikes": row.strikes,
        "enrolled_at": row.enrolled_at,
        "certificate_not_after": row.certificate_not_after,
        "presence": seen.status if seen else "",
        "release_version": seen.release_version if seen else 0,
        "agent_version": seen.agent_version if seen else "",
        "agent_too_old": seen is not None and not is_new_enough(seen.agent_version, least),
        "last_seen": seen.last_seen if seen else 0.0,
    }


def _release(row: ReleaseRow, rings: Mapping[str, int]) -> dict[str, Any]:
    return {
        "version": row.version,
        "state": row.state,
        "reason": row.reason,
        "rings": sorted(ring for ring, version in rings.items() if version == row.version),
        "run": row.run,
        "round": row.round,
        "metrics": dict(row.metrics),
        "graphs_sha256": row.graphs_sha256,
        "checkpoint_sha256": row.checkpoint_sha256,
        "created": row.created,
    }
