"""`shoal-cloud backup`: a copy of everything, while the service runs."""

from __future__ import annotations

import argparse
import os

from cloud_server.backup.backup import make_backup
from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_json, say
from cloud_server.deployment import Deployment
from process.arguments import path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=path, metavar="FILE", help="the backup (0600); must not exist yet")
    add_state(parser)
    add_json(parser)
    parser.set_defaults(handler=_backup)


def _backup(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        listing = make_backup(deployment, options.file)
    size = options.file.stat().st_size
    if options.json:
        print_json(
            {
                "file": str(options.file),
                "size_bytes": size,
                "created": listing.created,
                "incarnation": listing.incarnation,
                "audit_entries": listing.audit_entries,
                "artefacts": listing.artefacts,
            }
        )
    say(
        f"wrote {options.file} ({size} bytes): it holds the online keys and the CA, keep it as you keep those"
    )
    if listing.artefacts:
        say(f"the artefacts are not in it: they are at {listing.artefacts}")
    return 0
