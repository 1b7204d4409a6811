"""`shoal-cloud restore`: an aggregator from a backup, as another life of the same deployment."""

from __future__ import annotations

import argparse

from cloud_server.backup.backup import restore_backup
from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_json, say
from process.arguments import path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path, metavar="FILE", help="the backup")
    parser.add_argument(
        "--offline",
        type=path,
        metavar="DIR",
        help="where the offline keys are: needed if a model was imported after the backup",
    )
    add_state(parser)
    add_json(parser)
    parser.set_defaults(handler=_restore)


def _restore(options: argparse.Namespace) -> int:
    restored = restore_backup(options.file, options.state, offline=options.offline)
    life = restored.incarnation
    if options.json:
        print_json(
            {
                "state": str(options.state),
                "incarnation": life.number,
                "release_floor": life.release_floor,
                "created": restored.listing.created,
                "audit_entries": restored.listing.audit_entries,
            }
        )
    say(f"restored {options.state}: incarnation {life.number}, releases go on above {life.release_floor}")
    say("make sure that the old aggregator never starts again; then: shoal-cloud run")
    say("devices that were let in after the backup are unknown, and enrol anew")
    if not restored.graphs_outrun:
        say(
            "the targets key was not here: if a model was imported after the backup, restore again with --offline"
        )
    return 0
