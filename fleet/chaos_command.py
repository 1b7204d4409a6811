"""`shoal-fleet chaos`: simulated histories, or with `--real` processes of this machine that are really broken.

Laws of the file: an option of the one kind is an error with the other, never passed over; nothing heavy is imported
before it is needed.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from process.arguments import CommandParser, path, whole_number
from wire.errors import BrokerError, ConfigurationError

MAX_SEEDS = 1_000_000
MAX_SEED = 2**31 - 1
MAX_FAULTS = 10_000
MAX_SECONDS = 7 * 86_400
EXIT_VIOLATION = 1
STATE_FILE = "histories.json"
BROKERS = ("mosquitto", "embedded")
SIMULATED_FAULTS, REAL_FAULTS = 10, 100
_SIMULATED: dict[str, Any] = {
    "seeds": 100,
    "first_seed": 0,
    "workers": 0,
    "trace": False,
    "regressions": None,
}
_REAL: dict[str, Any] = {"seconds": MAX_SECONDS, "kinds": (), "broker": None}


def add_chaos(commands: argparse._SubParsersAction[CommandParser]) -> None:
    """The command's options."""
    chaos = commands.add_parser("chaos", help="many whole fleets under faults, on virtual time or really")
    chaos.add_argument("--seeds", type=whole_number(1, MAX_SEEDS), help="histories, one for each seed (100)")
    chaos.add_argument("--first-seed", type=whole_number(0, MAX_SEED), help="the first of them (0)")
    chaos.add_argument(
        "--faults",
        type=whole_number(0, MAX_FAULTS),
        help="faults in each history (10); with --real: in all, over all kinds (100)",
    )
    chaos.add_argument("--workers", type=whole_number(0, 1024), help="processes; 0 for one a core (0)")
    chaos.add_argument(
        "--seed",
        type=whole_number(0, MAX_SEED),
        help="play this one history again; with --real: of the first fleet (1)",
    )
    chaos.add_argument(
        "--trace",
        action="store_true",
        default=None,
        help="with --seed: print what happened, line by line, to standard error",
    )
    chaos.add_argument("--real", action="store_true", help="real processes of this machine, really broken")
    chaos.add_argument(
        "--seconds",
        type=whole_number(1, MAX_SECONDS),
        help="with --real: begin no further fault after so long (a week)",
    )
    chaos.add_argument(
        "--kinds", type=_names, metavar="KIND,…", help="with --real: only these kinds of faults (all)"
    )
    chaos.add_argument(
        "--broker", choices=BROKERS, help="with --real: this broker (both in turn, where both are there)"
    )
    chaos.add_argument(
        "--out", type=path, metavar="DIR", help="folder of the campaign, which it goes on from"
    )
    chaos.add_argument(
        "--regressions", type=path, metavar="FILE", help="add the first failing history to this file, shrunk"
    )
    chaos.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")


def run_chaos(options: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    others, mine = (_SIMULATED, _REAL) if options.real else (_REAL, _SIMULATED)
    for name in others:
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            where = "simulated histories" if options.real else "real processes"
            hint = "leave it away, or --real" if options.real else "add --real, or leave it away"
            raise ConfigurationError(f"{option} is for {where}", hint=hint)
    for name, value in mine.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    # What is logged is every warning of a fleet that is being broken on purpose.
    logging.disable(logging.CRITICAL)
    return _real(options) if options.real else _simulated(options)


def _simulated(options: argparse.Namespace) -> int:
    from fleet.chaos.campaign import render, replay, run_campaign

    faults = SIMULATED_FAULTS if options.faults is None else options.faults
    if options.trace and options.seed is None:
        raise ConfigurationError("--trace shows one history", hint="say which: --seed N --trace")
    if options.seed is None:
        out: Path | None = options.out
        report = run_campaign(
            seeds=options.seeds,
            first_seed=options.first_seed,
            faults=faults,
            workers=options.workers,
            state=None if out is None else out / STATE_FILE,
            regressions=options.regressions,
            tell=_trace,
        )
    else:
        tell = _trace if options.trace else None
        report = replay(seed=options.seed, faults=faults, regressions=options.regressions, tell=tell)
    print(report.to_json() if options.json else render(report), end="")
    return EXIT_VIOLATION if report.violations else 0


def _trace(line: object) -> None:
    print(line, file=sys.stderr)


def _real(options: argparse.Namespace) -> int:
    from fleet.real_chaos.campaign import check_kinds, run_real_campaign
    from fleet.real_chaos.report import CampaignPlan, render_real

    plan = CampaignPlan(
        faults=REAL_FAULTS if options.faults is None else options.faults,
        seconds=float(options.seconds),
        seed=1 if options.seed is None else options.seed,
        kinds=check_kinds(options.kinds),
        brokers=_brokers(options.broker),
    )
    out: Path | None = options.out
    report = run_real_campaign(plan, None if out is None else out.absolute())
    print(report.to_json() if options.json else render_real(report), end="")
    return EXIT_VIOLATION if report.violations else 0


def _brokers(asked: str | None) -> tuple[Any, ...]:
    """The brokers of a campaign.

    Raises:
        BrokerError: the one that was asked for is not there.
    """
    from wire.transport.broker import find_mosquitto

    is_there = find_mosquitto() is not None
    if asked == "mosquitto" and not is_there:
        raise BrokerError("mosquitto is not on PATH", hint="install it (Debian: apt install mosquitto)")
    if asked is not None:
        return (asked,)
    return BROKERS if is_there else ("embedded",)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not names with commas between")
    return names
