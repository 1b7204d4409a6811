"""`shoal-cloud status`: the aggregator at a glance, from its state folder; the service need not run."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from typing import Any

from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_facts, print_json, say
from cloud_server.db.overview import list_rounds, list_runs, load_incarnation
from cloud_server.db.releases import load_models, load_releases, load_rollouts
from cloud_server.deployment import Deployment
from cloud_server.layout import is_locked

# A signature that is this close to its end although the service renews it at half of its life needs a person.
ALARM_SECONDS = {"root": 60 * 86_400.0, "targets": 30 * 86_400.0}
DEFAULT_ALARM_SECONDS = 6 * 3600.0


def configure(parser: argparse.ArgumentParser) -> None:
    add_state(parser)
    add_json(parser)
    parser.set_defaults(handler=_status)


def _status(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        facts = collect_status(deployment)
    (print_json if options.json else print_facts)(facts)
    for role in facts["expiring"]:
        say(f"warning: the signature of TUF role {role} ends soon")
    return 0


def collect_status(deployment: Deployment) -> dict[str, Any]:
    """What `status` prints."""
    registry, now = deployment.registry, deployment.clock.now()
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
        "devices": dict(Counter(row.status for row in registry.devices())),
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
            role
            for role, end in expiries.items()
            if end - now < ALARM_SECONDS.get(role, DEFAULT_ALARM_SECONDS)
        ),
    }
