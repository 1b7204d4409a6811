"""`shoal-cloud restore`: an aggregator from a backup, as another life of the same deployment."""

from __future__ import annotations

import argparse
import os

from cloud_server.backup.backup import restore_backup, restore_in_place
from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_json, say
from cloud_server.deployment import Deployment
from process.arguments import path, whole_number


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", type=path, nargs="?", metavar="FILE", help="the backup")
    what.add_argument(
        "--in-place",
        action="store_true",
        help="the database (PostgreSQL) and the state folder were brought back by their own tools",
    )
    parser.add_argument(
        "--offline",
        type=path,
        metavar="DIR",
        help="where the offline keys are: needed if a model was imported after the backup",
    )
    parser.add_argument(
        "--charges",
        type=whole_number(0),
        metavar="N",
        help="rounds charged to the privacy budget in all, until the lost aggregator ended: needed by a private fleet",
    )
    add_state(parser)
    add_json(parser)
    parser.set_defaults(handler=_restore)


def _restore(options: argparse.Namespace) -> int:
    if options.in_place:
        with Deployment.open(options.state, os.environ, offline=options.offline) as deployment:
            restored = restore_in_place(deployment, charges=options.charges)
    else:
        restored = restore_backup(
            options.file, options.state, offline=options.offline, charges=options.charges
        )
    life = restored.incarnation
    if options.json:
        print_json(
            {
                "state": str(options.state),
                "incarnation": life.number,
                "release_floor": life.release_floor,
                "created": restored.made,
                "audit_entries": restored.audit_entries,
                "lost_charges": restored.lost_charges,
            }
        )
    say(f"restored {options.state}: incarnation {life.number}, releases go on above {life.release_floor}")
    if restored.lost_charges:
        say(
            f"{restored.lost_charges} private rounds after the backup are charged as the costliest there were"
        )
    say("make sure that the old aggregator never starts again; then: shoal-cloud run")
    say("devices that were let in after the backup are unknown, and enrol anew")
    if not restored.graphs_outrun:
        say(
            "the targets key was not here: if a model was imported after the backup, restore again with --offline"
        )
    return 0
