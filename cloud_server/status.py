"""The aggregator at a glance, from its state folder: what `shoal-cloud status` and the operators' interface show."""

from __future__ import annotations

from collections import Counter
from typing import Any

from cloud_server.db.overview import list_rounds, list_runs, load_incarnation
from cloud_server.db.releases import load_models, load_releases, load_rollouts
from cloud_server.deployment import Deployment
from cloud_server.enrolment.queue import is_claimed_twice, is_pending
from cloud_server.layout import is_locked
from cloud_server.release.expiry import judge_expiries


def collect_status(deployment: Deployment) -> dict[str, Any]:
    """Counts by state, what waits for a person, and what ends soon; the service need not run."""
    registry, now = deployment.registry, deployment.clock.now()
    devices = registry.devices()
    expiries = deployment.repository.expiries()
    with deployment.database.read() as connection:
        rounds = list_rounds(connection, last=1)
        runs = list_runs(connection)
        releases = Counter(row.state for row in load_releases(connection))
        rings = {row.ring: row.release_version for row in load_rollouts(connection)}
        models = [row.name for row in load_models(connection)]
        incarnation = load_incarnation(connection)
    newest = rounds[-1] if rounds else None
    return {
        "tenant": deployment.settings.tenant,
        "fleet": deployment.settings.fleet,
        "state": str(deployment.folder.root),
        "is_running": is_locked(deployment.folder.lock("service")),
        "incarnation": incarnation,
        "devices": dict(Counter(row.status for row in devices)),
        "pending": sum(is_pending(row) for row in devices),
        "claimed_twice": [row.device for row in devices if is_claimed_twice(row)],
        "online": len(registry.present()),
        "models": models,
        "run": runs[-1]["run"] if runs else "",
        "run_status": runs[-1]["status"] if runs else "",
        "round": newest["round"] if newest else 0,
        "round_state": newest["state"] if newest else "",
        "releases": dict(releases),
        "rings": rings,
        "expires": expiries,
        "expiring": sorted(
            each.role for each in judge_expiries(expiries, deployment.repository.expiry, now) if each.is_due
        ),
    }
