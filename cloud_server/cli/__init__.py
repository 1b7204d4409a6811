"""`shoal-cloud`: make, run and look at an aggregator.

Laws of the folder: one file per command; standard output is data (`--json` where a script would read it),
standard error is talk; nothing is imported before the command that needs it is known, so that `device list`
never waits for torch. Source: docs/reference.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from process.arguments import CommandParser, path
from process.exits import run_cli
from wire.topics import ID

DEFAULT_STATE = "/var/lib/shoal-cloud"

COMMANDS = {
    "init": "make the state folder of a new aggregator",
    "run": "run the aggregator",
    "status": "the aggregator at a glance",
    "check": "look at everything that the aggregator needs",
    "device": "let devices in, look at them, shut them out",
    "model": "the models that devices may run",
    "round": "federated rounds",
    "release": "what the rings run",
    "privacy": "the privacy budget and its ledger",
    "helper": "the second server of secure aggregation, for another party to run",
    "broker": "the files of a broker that you run yourself",
    "audit": "the books: whether they are whole, and what stands in them",
    "user": "people and scripts that may use the operators' interface",
    "backup": "keep a copy of everything",
    "restore": "bring an aggregator back from a copy",
    "sign": "sign a request where the offline keys are: needs no state folder, no network and no extra",
    "keys": "make, show, rotate and sign with the keys that devices trust",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (`process/exits.py`)."""
    return run_cli(lambda: _dispatch(sys.argv[1:] if arguments is None else list(arguments)), extra="cloud")


def _dispatch(arguments: list[str]) -> int:
    parser = CommandParser(prog="shoal-cloud", description="The aggregator of one Shoal fleet.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Only the command at hand is imported; the others are a name and a line of help.
    wanted = next((word for word in arguments if not word.startswith("-")), "")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == wanted:
            import_module(f"cloud_server.cli.{name}_command").configure(command)
    options = parser.read(arguments)
    code: int = options.handler(options)
    return code


def add_state(parser: argparse.ArgumentParser) -> None:
    """`--state`, which every command takes."""
    parser.add_argument(
        "--state",
        type=path,
        default=os.environ.get("SHOAL_STATE", DEFAULT_STATE),
        metavar="DIR",
        help=f"the aggregator's state folder (SHOAL_STATE, or {DEFAULT_STATE})",
    )


def ring_name(text: str) -> str:
    """A ring's name, for `type=` of an option.

    Raises:
        argparse.ArgumentTypeError: (operator) it cannot stand in a topic or in the name of an artefact.
    """
    if not ID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be a ring's name: use A-Z a-z 0-9 _ - (1 to 64)")
    return text


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`, of every command that prints something a script would read."""
    parser.add_argument("--json", action="store_true", help="print JSON")
