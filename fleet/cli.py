"""`shoal-fleet`: local fleets, to see the whole loop and to try a scenario before it meets devices.

Laws of the file: standard output is data (`--json` prints one object and nothing else), standard error is talk; nothing
heavy is imported before a command needs it. Source: docs/reference.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fleet.chaos_command import EXIT_VIOLATION, add_chaos, run_chaos
from process.arguments import CommandParser, path, whole_number
from process.exits import run_cli
from wire.errors import ConfigurationError, StorageError

if TYPE_CHECKING:
    from fleet.report import FleetReport

MAX_DEVICES = 100_000
MAX_ROUNDS = 1_000_000
MAX_SEED = 2**31 - 1
MAX_ATTACKERS = 0.9
MAX_LOAD = 50_000
ATTACKS = ("sign_flip", "boost", "label_flip", "alie", "ipm", "noise", "backdoor")
"""Those of `fleet.attacks`, which is not imported before it is needed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code (`process/exits.py`)."""
    return run_cli(lambda: _dispatch(sys.argv[1:] if arguments is None else list(arguments)), extra="fleet")


def _dispatch(arguments: list[str]) -> int:
    options = _parser().read(arguments)
    handler = {"demo": _demo, "simulate": _simulate, "chaos": run_chaos, "load": _load}[options.command]
    return handler(options)


def _parser() -> CommandParser:
    parser = CommandParser(prog="shoal-fleet", description="Local fleets of Shoal devices.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="one whole loop with real processes on this machine")
    demo.add_argument("--dataset", default="smartwatch", help="smartwatch (default) or fashion-mnist")
    demo.add_argument("--broker", choices=("embedded", "mosquitto"), default="embedded")
    demo.add_argument(
        "--rounds", type=whole_number(1, MAX_ROUNDS), default=20, help="rounds that move the head (20)"
    )
    demo.add_argument(
        "--seed", type=whole_number(0, MAX_SEED), default=1, help="of weights, cohorts and orders (1)"
    )
    demo.add_argument(
        "--out", type=path, default=Path("build/demo"), help="folder for all it makes (build/demo)"
    )
    demo.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    simulate = commands.add_parser("simulate", help="a whole fleet in one process, on virtual time")
    simulate.add_argument(
        "--model", metavar="NAME", help="model of the zoo, with its data set (the scenario's; watch_cnn1d)"
    )
    simulate.add_argument(
        "--devices", type=whole_number(1, MAX_DEVICES), default=100, help="simulated devices (100)"
    )
    simulate.add_argument(
        "--rounds", type=whole_number(1, MAX_ROUNDS), default=20, help="rounds that move the head (20)"
    )
    simulate.add_argument("--scenario", type=path, metavar="FILE", help="a scenario as TOML")
    simulate.add_argument(
        "--seed", type=whole_number(0, MAX_SEED), default=1, help="of everything that is drawn (1)"
    )
    simulate.add_argument(
        "--attack", choices=ATTACKS, help="what attackers among the devices do (the scenario's; none)"
    )
    simulate.add_argument(
        "--attackers",
        type=_share,
        metavar="SHARE",
        help="share of the devices that attack (the scenario's; 0.2)",
    )
    simulate.add_argument("--out", type=path, metavar="DIR", help="folder for report.json and report.html")
    simulate.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    add_chaos(commands)
    load = commands.add_parser(
        "load", help="thousands of light agents on real connections, one round, one release"
    )
    load.add_argument(
        "--devices",
        type=whole_number(1, MAX_LOAD),
        default=1_000,
        help="light agents, all live at once (1000)",
    )
    load.add_argument(
        "--seconds",
        type=whole_number(0, 86_400),
        default=60,
        help="of heartbeats alone before the round (60)",
    )
    load.add_argument(
        "--processes", type=whole_number(0, 1024), default=0, help="of agents; 0 for one a core (0)"
    )
    load.add_argument("--plain", action="store_true", help="without TLS, to see what it costs")
    load.add_argument(
        "--out", type=path, default=Path("build/load"), help="folder for all it makes (build/load)"
    )
    load.add_argument("--json", action="store_true", help="print the report as JSON instead of the table")
    return parser


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 < share <= MAX_ATTACKERS:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0 and up to {MAX_ATTACKERS}")
    return share


def _demo(options: argparse.Namespace) -> int:
    from fleet.demo import DemoPlan, run_demo

    plan = DemoPlan(dataset=options.dataset, rounds=options.rounds, seed=options.seed, broker=options.broker)
    report = run_demo(plan, options.out)
    return _show(options, report, options.out)


def _simulate(options: argparse.Namespace) -> int:
    from cloud_server.flower.strategies import build_strategy
    from cloud_server.secure.opening import check_setup, masking_rules
    from fleet.scenario import load_scenario, with_attack, with_model
    from fleet.simulate import simulate

    scenario = load_scenario(options.scenario)
    if options.model is not None:
        scenario = with_model(scenario, options.model)
    scenario = with_attack(scenario, options.attack, options.attackers)
    # Said now, and not after a first model was trained for it.
    run = scenario.run
    rules = masking_rules(scenario.secure.policy, scenario.secure.dropout, 0.0)
    is_central = scenario.privacy.mode == "central"
    check_setup(rules, build_strategy(run.strategy, run.parameters), has_app=False, is_central=is_central)
    with _folder(options.out):
        report = simulate(scenario, devices=options.devices, rounds=options.rounds, seed=options.seed)
    return _show(options, report, options.out)


def _load(options: argparse.Namespace) -> int:
    from fleet.load.campaign import MARKER, LoadPlan, run_load
    from fleet.load.open_files import allow_open_files
    from fleet.load.report import render
    from fleet.out_folder import make_empty
    from models.data import digits
    from models.first_bundle import make_first_bundle

    # Said now, and not after a model was trained for it.
    allow_open_files(options.devices)
    make_empty(options.out, MARKER, "load")
    federation = digits.federation(devices=2)
    bundle = make_first_bundle(federation, "digits_mlp", options.out / "bundle", seed=1)
    plan = LoadPlan(
        devices=options.devices,
        seconds=options.seconds,
        processes=options.processes,
        is_tls=not options.plain,
    )
    report = run_load(plan, options.out, bundle, federation)
    (options.out / "report.json").write_text(report.to_json(), encoding="utf-8")
    print(report.to_json() if options.json else render(report), end="")
    return 0 if report.is_good else EXIT_VIOLATION


@contextmanager
def _folder(out: Path | None) -> Iterator[None]:
    """Makes sure that the report can be written before there is one; takes an empty folder back on failure.

    Raises:
        ConfigurationError: (operator) something else lies there.
        StorageError: (disk) it cannot be made or written.
    """
    if out is None:
        yield
        return
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigurationError(f"{out} is not a folder", hint="name a folder with --out") from error
    except OSError as error:
        raise StorageError(f"{out} cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise StorageError(f"{out} cannot be written", hint="name a folder of yours with --out")
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):
                out.rmdir()
        raise


def _show(options: argparse.Namespace, report: FleetReport, out: Path | None) -> int:
    from fleet.page import render_page
    from fleet.report import render_table

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(report.to_json(), encoding="utf-8")
        (out / "report.html").write_text(render_page(report), encoding="utf-8")
        print(f"report: {out / 'report.html'}", file=sys.stderr)
    print(report.to_json() if options.json else render_table(report), end="")
    return 0
