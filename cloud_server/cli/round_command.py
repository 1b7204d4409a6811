"""`shoal-cloud round`: what became of each round, order and update."""

from __future__ import annotations

import argparse
import os
import sys

from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_facts, print_json, print_table
from cloud_server.db.grid_steps import begin_anew, load_steps
from cloud_server.db.overview import list_rounds, list_runs, show_round
from cloud_server.db.rounds import load_run, set_run_status
from cloud_server.deployment import Deployment
from process.arguments import whole_number
from wire.errors import ConfigurationError

MAX_ROUND = 2**31 - 1
_COLUMNS = ("run", "round", "state", "cohort", "seconds", "metrics", "reason", "started")


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="rounds, oldest first")
    listing.add_argument(
        "--last", type=whole_number(1), default=0, metavar="N", help="only the newest so many"
    )
    listing.set_defaults(handler=_list)
    show = actions.add_parser("show", help="one round, with every order and update")
    show.add_argument("round", type=whole_number(1, MAX_ROUND))
    show.set_defaults(handler=_show)
    pause = actions.add_parser("pause", help="open no further round; one under way ends well")
    pause.set_defaults(handler=lambda options: _set_status(options, "paused"))
    resume = actions.add_parser("resume", help="go on with opening rounds")
    resume.set_defaults(handler=lambda options: _set_status(options, "active"))
    anew = actions.add_parser(
        "anew", help="let a stock ServerApp begin again from its start, at its next start"
    )
    anew.set_defaults(handler=_begin_anew)
    for command in (pause, resume, anew):
        command.add_argument("--run", default="", help="the run; the one of the settings, if left away")
        add_state(command)
    for command in (listing, show):
        command.add_argument("--run", default="", help="the run; the newest, if left away")
        add_state(command)
        add_json(command)


def _list(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment, deployment.database.read() as connection:
        rows = list_rounds(connection, options.run, last=options.last)
    if options.json:
        print_json(rows)
    else:
        print_table(rows, _COLUMNS)
    return 0


def _set_status(options: argparse.Namespace, status: str) -> int:
    """A running service sees it within seconds."""
    with Deployment.open(options.state, os.environ) as deployment:
        run = options.run or deployment.settings.run.name
        with deployment.database.transaction() as connection:
            row = load_run(connection, run)
            if row is None:
                raise ConfigurationError(
                    f"there is no run {run}", hint="it begins with the first `shoal-cloud run`"
                )
            if row.status == "finished":
                raise ConfigurationError(
                    f"run {run} is finished", hint="give run.name of the settings another name"
                )
            set_run_status(connection, run, status)
    print(f"run {run} is {status}", file=sys.stderr)
    return 0


def _begin_anew(options: argparse.Namespace) -> int:
    """Forgets what an app did so far in its run; a service that runs elsewhere may write nothing more."""
    with Deployment.open(options.state, os.environ) as deployment:
        run = options.run or deployment.settings.run.name
        with deployment.database.read() as connection:
            if not load_steps(connection, run):
                raise ConfigurationError(
                    f"there is no record of an app in run {run}",
                    hint="it is kept while a run with --serverapp, or run.serverapp, goes on",
                )
        with deployment.folder.lock("service").at_once("the aggregator is running: stop it first"):
            fence = deployment.database.claim_writer()
            with deployment.database.transaction(fence=fence) as connection:
                keys = begin_anew(connection, run, deployment.clock.now())
        for key in keys:
            deployment.artefacts.delete_blob(key)
    print(f"the app of run {run} begins anew with the next `shoal-cloud run`", file=sys.stderr)
    return 0


def _show(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment, deployment.database.read() as connection:
        runs = list_runs(connection)
        run = options.run or (runs[-1]["run"] if runs else "")
        facts = show_round(connection, run, options.round)
    if facts is None:
        raise ConfigurationError(
            f"there is no round {options.round} of run {run or '(none)'}",
            hint="`shoal-cloud round list` shows them all",
        )
    if options.json:
        print_json(facts)
        return 0
    orders, updates = facts.pop("orders"), facts.pop("updates")
    print_facts(facts)
    print()
    print_table(orders, ("device", "kind", "state", "reason"))
    print()
    columns = ("device", "kind", "state", "num_examples", "staleness", "size_bytes", "metrics", "reason")
    print_table(updates, columns)
    return 0
