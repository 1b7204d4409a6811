"""`shoal-cloud release`: what was released or held back, and the operator's word over the gate's."""

from __future__ import annotations

import argparse
import os
from typing import Any

from cloud_server.cli import add_json, add_state, ring_name
from cloud_server.cli.output import print_facts, print_json, print_table, say
from cloud_server.db.engine import Connection
from cloud_server.db.releases import ReleaseRow, load_release, load_releases, load_rollouts
from cloud_server.deployment import Deployment
from cloud_server.release.publish import DEFAULT_RING
from process.arguments import whole_number
from wire.errors import ConfigurationError

_COLUMNS = ("version", "state", "rings", "run", "round", "metrics", "reason", "created")


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="every release and every candidate")
    listing.set_defaults(handler=_list)
    show = actions.add_parser("show", help="one release")
    show.add_argument("version", type=whole_number(1))
    show.set_defaults(handler=_show)
    promote = actions.add_parser("promote", help="point a ring at a release, held back or not")
    promote.add_argument("version", type=whole_number(1))
    promote.set_defaults(handler=_promote)
    rollback = actions.add_parser("rollback", help="take a ring back to an older release")
    rollback.add_argument(
        "version", type=whole_number(1), nargs="?", default=0, help="what it ran before, if left away"
    )
    rollback.add_argument("--reason", default="", help="kept in the books")
    rollback.set_defaults(handler=_rollback)
    for command in (promote, rollback):
        command.add_argument(
            "--ring", type=ring_name, default=DEFAULT_RING, help=f"the ring ({DEFAULT_RING})"
        )
    for command in (listing, show, promote, rollback):
        add_state(command)
        add_json(command)


def _list(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment, deployment.database.read() as connection:
        rings = _rings(load_rollouts(connection))
        rows = [_facts(row, rings) for row in load_releases(connection)]
    if options.json:
        print_json(rows)
    else:
        print_table(rows, _COLUMNS)
    return 0


def _show(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment, deployment.database.read() as connection:
        row = _existing(connection, options.version)
        rollouts = load_rollouts(connection)
    facts = _facts(row, _rings(rollouts))
    facts["history"] = [
        f"{'rolled back' if one.rollback else 'set'} {one.ring} {one.previous_version} -> {one.release_version}"
        for one in rollouts
        if options.version in (one.release_version, one.previous_version)
    ]
    (print_json if options.json else print_facts)(facts)
    return 0


def _promote(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        with deployment.database.read() as connection:
            _existing(connection, options.version)
        current = deployment.publisher.current_version(options.ring)
        if options.version < current:
            raise ConfigurationError(
                f"ring {options.ring} runs release {current}, which is newer than {options.version}",
                hint=f"shoal-cloud release rollback {options.version} --ring {options.ring}",
            )
        deployment.publisher.publish(options.version, options.ring)
    return _tell(options, options.version)


def _rollback(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        if options.version:
            with deployment.database.read() as connection:
                _existing(connection, options.version)
        announcement = deployment.publisher.rollback(
            options.ring, version=options.version, reason=options.reason
        )
    return _tell(options, announcement.release_version)


def _existing(connection: Connection, version: int) -> ReleaseRow:
    row = load_release(connection, version)
    if row is None:
        raise ConfigurationError(
            f"there is no release {version}", hint="`shoal-cloud release list` shows them all"
        )
    return row


def _tell(options: argparse.Namespace, version: int) -> int:
    if options.json:
        print_json({"ring": options.ring, "release_version": version})
    say(f"ring {options.ring} runs release {version}")
    return 0


def _rings(rollouts: list[Any]) -> dict[str, int]:
    """What each ring runs: the last statement counts."""
    return {row.ring: row.release_version for row in rollouts}


def _facts(row: ReleaseRow, rings: dict[str, int]) -> dict[str, Any]:
    return {
        "version": row.version,
        "state": row.state,
        "rings": sorted(ring for ring, version in rings.items() if version == row.version),
        "reason": row.reason,
        "run": row.run,
        "round": row.round,
        "metrics": dict(row.metrics),
        "graphs_sha256": row.graphs_sha256,
        "checkpoint_sha256": row.checkpoint_sha256,
        "int8_sha256": row.int8_sha256,
        "float32_sha256": row.float32_sha256,
        "created": row.created,
    }
