"""`shoal-cloud user`: who may use the operators' interface."""

from __future__ import annotations

import argparse
import os

from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_json, print_table, say
from cloud_server.db.operators import load_operators
from cloud_server.deployment import Deployment
from cloud_server.operators.accounts import Role, add_operator, remove_operator
from cloud_server.operators.views import operator
from process.arguments import path
from wire.primitives import write_private


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="let somebody in; prints his token, which is not kept")
    add.add_argument("name", metavar="NAME")
    add.add_argument(
        "--role",
        choices=[str(role) for role in Role],
        default=str(Role.VIEWER),
        help="viewer looks; operator also acts on devices, releases and rounds; admin also on users (viewer)",
    )
    add.add_argument("--output", type=path, metavar="FILE", help="write the token into a file (0600) instead")
    add.set_defaults(handler=_add)
    listing = actions.add_parser("list", help="everybody who may come in")
    listing.set_defaults(handler=_list)
    remove = actions.add_parser("remove", help="end somebody's access at once")
    remove.add_argument("name", metavar="NAME")
    remove.set_defaults(handler=_remove)
    for command in (add, listing, remove):
        add_state(command)
    for command in (add, listing):
        add_json(command)


def _add(options: argparse.Namespace) -> int:
    with (
        Deployment.open(options.state, os.environ) as deployment,
        deployment.database.transaction() as connection,
    ):
        token = add_operator(connection, options.name, Role(options.role), deployment.clock.now())
        # Inside: who cannot be handed his token is not let in.
        if options.output is not None:
            write_private(options.output, f"{token}\n".encode())
        elif options.json:
            print_json({"name": options.name, "role": options.role, "token": token})
        else:
            print(token)
    say(f"{options.name} is {options.role}: Authorization: Bearer TOKEN")
    return 0


def _list(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment, deployment.database.read() as connection:
        rows = [operator(row) for row in load_operators(connection)]
    if options.json:
        print_json(rows)
    else:
        print_table(rows, ("name", "role", "last_seen", "created"))
    return 0


def _remove(options: argparse.Namespace) -> int:
    with (
        Deployment.open(options.state, os.environ) as deployment,
        deployment.database.transaction() as connection,
    ):
        remove_operator(connection, options.name, deployment.clock.now())
    say(f"{options.name} has no access any more")
    return 0
