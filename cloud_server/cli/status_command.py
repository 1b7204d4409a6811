"""`shoal-cloud status`: the aggregator at a glance, from its state folder; the service need not run."""

from __future__ import annotations

import argparse
import os

from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_facts, print_json, say
from cloud_server.deployment import Deployment
from cloud_server.status import collect_status


def configure(parser: argparse.ArgumentParser) -> None:
    add_state(parser)
    add_json(parser)
    parser.set_defaults(handler=_status)


def _status(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        facts = collect_status(deployment)
    (print_json if options.json else print_facts)(facts)
    for role in facts["expiring"]:
        say(f"warning: the signature of TUF role {role} ends soon: see `shoal-cloud keys expiry`")
    for device in facts["claimed_twice"]:
        say(f"warning: the token of {device} was claimed twice: see docs/how-to/enrol-a-fleet.md")
    if facts["pending"]:
        say(f"{facts['pending']} devices wait for approval: see `shoal-cloud device list --pending`")
    return 0
