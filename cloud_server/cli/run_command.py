"""`shoal-cloud run`: the service, until a signal ends it."""

from __future__ import annotations

import argparse
import gc
import os
from importlib import import_module

from cloud_server.cli import add_state


def configure(parser: argparse.ArgumentParser) -> None:
    add_state(parser)
    parser.add_argument(
        "--serverapp",
        default="",
        metavar="MODULE:APP",
        help="a stock Flower ServerApp that drives the rounds",
    )
    parser.add_argument(
        "--standby",
        action="store_true",
        help="wait while another aggregator on the same PostgreSQL database runs, and take over when it is silent",
    )
    parser.set_defaults(handler=_run)


def _run(options: argparse.Namespace) -> int:
    from cloud_server.deployment import Deployment
    from process.logs import configure_logs
    from process.service_manager import ServiceManager

    with Deployment.open(options.state, os.environ) as deployment:
        log = deployment.settings.log
        configure_logs("json" if log.json else "logfmt", log.level)
        refusal = f"an aggregator is running on {options.state} already"
        with deployment.folder.lock("service").at_once(refusal):
            # Named, not imported: the service brings torch and flwr, which no other command waits for.
            service = import_module("cloud_server.service")
            manager = ServiceManager.of(os.environ)
            code: int = service.run(
                deployment, serverapp=options.serverapp, standby=options.standby, service_manager=manager
            )
    # The interpreter's last collection would walk through all of torch, for seconds on a small machine.
    gc.freeze()
    return code
