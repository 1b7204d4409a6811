"""`shoal-cloud restore`: an aggregator from a backup, as another life of the same deployment."""

from __future__ import annotations

import argparse

from cloud_server.backup.backup import restore_backup
from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_json, say
from process.arguments import path, whole_number


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path, metavar="FILE", help="the backup")
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
    restored = restore_backup(options.file, options.state, offline=options.offline, charges=options.charges)
    life = restored.incarnation
    if options.json:
        print_json(
            {
                "state": str(options.state),
                "incarnation": life.number,
                "release_floor": life.release_floor,
                "created": restored.listing.created,
                "audit_entries": restored.listing.audit_entries,
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
