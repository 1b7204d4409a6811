"""`shoal-edge`: enrol a device, run its agent, look at it, check what it needs.

Laws of the file: standard output is data (answers, `--json`), standard error is talk; nothing heavy is
imported before a command needs it; a token comes from a file, from standard input or from the environment and
never from the command line, which everybody on the machine can read. Source: docs/reference.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from process.arguments import CommandParser, path, whole_number
from process.exits import run_cli

if TYPE_CHECKING:
    from edge_agent.settings import EdgeSettings

DEFAULT_STATE = "/var/lib/shoal"
_TABLE_WIDTH = 24


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (`process/exits.py`)."""
    return run_cli(lambda: _dispatch(sys.argv[1:] if arguments is None else list(arguments)))


def _dispatch(arguments: list[str]) -> int:
    options = _parser().read(arguments)
    handler = {
        "enroll": _enroll,
        "run": _run,
        "status": _status,
        "check": _check,
        "quarantine": _quarantine,
        "forget": _forget,
    }[options.command]
    # Whatever a library writes into the state folder is its owner's alone.
    before = os.umask(0o077)
    try:
        return handler(options)
    finally:
        os.umask(before)


def _parser() -> CommandParser:
    parser = CommandParser(prog="shoal-edge", description="The agent of one Shoal device.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    state = CommandParser(add_help=False)
    state.add_argument(
        "--state",
        type=path,
        default=os.environ.get("SHOAL_STATE", DEFAULT_STATE),
        metavar="DIR",
        help=f"the device's state folder (SHOAL_STATE, or {DEFAULT_STATE})",
    )
    state.add_argument("--settings", type=path, metavar="FILE", help="settings as TOML")
    enroll = commands.add_parser("enroll", parents=[state], help="make this machine a device of a fleet")
    enroll.add_argument("token", nargs="?", metavar="-", help="read the enrolment token from standard input")
    enroll.add_argument("--token-file", type=path, metavar="FILE", help="a file that holds the token")
    enroll.add_argument(
        "--wait",
        type=whole_number(0, 86_400),
        default=0,
        metavar="SECONDS",
        help="go on asking for so long while the aggregator is busy, or not there (default: ask once)",
    )
    enroll.add_argument("--name", metavar="DEVICE", help="the device's name, where the token leaves it open")
    run = commands.add_parser("run", parents=[state], help="run the agent")
    run.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SOURCE",
        help="where windows come from: - (JSON lines), a .npy or .csv file, a folder, mqtt://host:port/topic",
    )
    run.add_argument("--once", action="store_true", help="stop when all inputs have ended")
    for name, what in (("status", "show what the agent does"), ("check", "look at everything that it needs")):
        command = commands.add_parser(name, parents=[state], help=what)
        command.add_argument("--json", action="store_true", help="print JSON")
    quarantine = commands.add_parser(
        "quarantine", parents=[state], help="list what was found damaged, or read it"
    )
    shown = quarantine.add_mutually_exclusive_group()
    shown.add_argument("--read", metavar="NAME", help="write one entry, opened, to standard output")
    shown.add_argument("--json", action="store_true", help="print JSON")
    forget = commands.add_parser(
        "forget", parents=[state], help="destroy what the device keeps, and the keys of every copy of it"
    )
    forget.add_argument(
        "what",
        choices=("samples", "everything"),
        help="samples, or everything (what is owed to the cloud, too)",
    )
    return parser


def _settings(options: argparse.Namespace) -> EdgeSettings:
    from edge_agent.settings import load_edge_settings

    return load_edge_settings(options.settings, os.environ)


# --- enroll -------------------------------------------------------------------------------------------------


def _enroll(options: argparse.Namespace) -> int:
    import random

    from edge_agent.enrolment.enrol import enrol
    from edge_agent.enrolment.patience import Patience
    from process.clock import SystemClock
    from wire.backoff import Backoff, Retries

    clock = SystemClock()
    patience = Patience(options.wait, Retries(Backoff(), random.SystemRandom()), clock)
    identity = enrol(_token(options), options.state, name=options.name, clock=clock, patience=patience)
    print(f"enrolled {identity.device} in {identity.tenant}/{identity.fleet}", file=sys.stderr)
    if identity.is_waiting:
        approve = f"shoal-cloud device approve {identity.device}"
        print(
            f"it gets releases, and is asked for rounds once an operator approves it: {approve}",
            file=sys.stderr,
        )
    print(f"next: shoal-edge run --state {options.state}", file=sys.stderr)
    return 0


def _token(options: argparse.Namespace) -> str:
    from edge_agent.settings import TOKEN_VARIABLE
    from process.settings import read_secret
    from wire.errors import ConfigurationError

    if options.token not in (None, "-"):
        raise ConfigurationError(
            "a token on the command line can be read by everybody on this machine",
            hint="take it from a file (--token-file FILE) or from standard input (-); this one has been seen: make"
            " another",
        )
    if options.token is not None and options.token_file is not None:
        raise ConfigurationError(
            "the token is given twice", hint="give it in a file or on standard input, not both"
        )
    if options.token_file is not None:
        return read_secret(options.token_file, "the enrolment token")
    if options.token == "-":
        return sys.stdin.readline(65_536).strip()
    token = _token_of_environment()
    if not token:
        raise ConfigurationError(
            "no enrolment token",
            hint=f"give it with --token-file FILE, on standard input (-), or in {TOKEN_VARIABLE}",
        )
    return token


def _token_of_environment() -> str:
    """The token in a variable, or in the file that one names; taken out of the environment. Empty without one."""
    from edge_agent.settings import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE
    from process.settings import read_secret

    token, file = os.environ.pop(TOKEN_VARIABLE, ""), os.environ.pop(TOKEN_FILE_VARIABLE, "")
    return token or (read_secret(Path(file), "the enrolment token") if file else "")


# --- run ----------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from edge_agent.release.slots import FOLDER_NAME as SLOTS_NAME
    from edge_agent.running import check_source, run_agent
    from process.logs import configure_logs
    from wire.errors import ConfigurationError

    settings = _settings(options)
    if options.once and not options.input:
        raise ConfigurationError("--once waits for inputs, and there is none", hint="name one with --input")
    for source in options.input:
        check_source(source, once=options.once)
    configure_logs("json" if settings.log.json else "logfmt", settings.log.level)
    refused = _enrol_at_first_run(options)
    if refused and not (options.state / SLOTS_NAME).is_dir():
        return refused
    return run_agent(options.state, settings, options.input, once=options.once)


def _enrol_at_first_run(options: argparse.Namespace) -> int:
    """A container enrols itself from its environment, once; 0, or the exit code of an enrolment that failed. A device
    that lost its identity and has a model goes on without (`late_identity.py`)."""
    from edge_agent.enrolment.identity import FOLDER_NAME
    from edge_agent.settings import TOKEN_VARIABLE

    if (options.state / FOLDER_NAME).exists():
        os.environ.pop(TOKEN_VARIABLE, "")  # no child needs to see it
        return 0
    token = _token_of_environment()
    if not token:
        return 0
    from edge_agent.enrolment.first_run import enrol_in_child

    return enrol_in_child(token, options.state)


# --- status and check ---------------------------------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    from edge_agent.enrolment.identity import load
    from edge_agent.vitals.status import read_status
    from wire.errors import ShoalError

    status = read_status(options.state)
    try:
        identity = load(options.state)
        status = status or {
            "status": "never ran",
            "device": identity.device,
            "fleet": f"{identity.tenant}/{identity.fleet}",
            "broker": f"{identity.mqtt_host}:{identity.mqtt_port}",
        }
    except ShoalError as error:
        if status is None:
            raise
        print(f"identity: {error}", file=sys.stderr)
        print(f"hint: {error.hint}", file=sys.stderr)
    if status.get("status") == "running" and not _is_running(options.state):
        status = {**status, "status": "gone", "connected": False}
    if options.json:
        print(json.dumps(status, indent=2, sort_keys=True))
    else:
        for name, value in status.items():
            print(f"{name.replace('_', ' '):<{_TABLE_WIDTH}}{_text(value)}")
    if status.get("is_too_old") is True:
        from wire.agent_versions import TOO_OLD_HINT

        print(f"this agent is older than {_text(status.get('least_agent_version'))}", file=sys.stderr)
        print(f"hint: {TOO_OLD_HINT}", file=sys.stderr)
    return 0


def _is_running(folder: Path) -> bool:
    from edge_agent.lock import is_locked

    return is_locked(folder)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(_text(inner) for inner in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _check(options: argparse.Namespace) -> int:
    from edge_agent.vitals.check import run_checks
    from process.clock import SystemClock
    from process.health import exit_code

    findings = []
    for finding in run_checks(options.state, _settings(options), SystemClock()):
        findings.append(finding)
        if not options.json:
            print("\n".join(finding.lines()))
    if options.json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=2))
    return exit_code(findings)


# --- what is kept -------------------------------------------------------------------------------------------


def _quarantine(options: argparse.Namespace) -> int:
    from edge_agent.store.at_rest import open_vault
    from edge_agent.store.quarantine import FOLDER_NAME, Quarantine
    from process.clock import SystemClock
    from wire.errors import ConfigurationError

    if not options.state.is_dir():
        raise ConfigurationError(f"there is no {options.state}", hint="name the device's --state")
    vault = open_vault(options.state, SystemClock(), is_owner=False)
    quarantine = Quarantine(options.state / FOLDER_NAME, vault=vault)
    if options.read is not None:
        sys.stdout.buffer.write(quarantine.read(options.read))
        return 0
    found = [
        {"name": name, "size_bytes": size, "reason": reason} for name, size, reason in quarantine.entries()
    ]
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for entry in found:
        print(f"{entry['name']}  {entry['size_bytes']} bytes  {entry['reason']}")
    return 0


def _forget(options: argparse.Namespace) -> int:
    from edge_agent.store.forget import forget
    from process.clock import SystemClock

    forgotten = forget(options.state, options.what, SystemClock())
    print(f"forgot {forgotten.samples} samples and {forgotten.updates} updates", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
