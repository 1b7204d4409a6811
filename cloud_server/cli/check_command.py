"""`shoal-cloud check`: everything that an aggregator needs, looked at one by one, with what to do about it.

The judging is that of the running service (`cloud_server/checks/`); here the facts are gathered from outside of it.
"""

from __future__ import annotations

import argparse
import os
import socket
import ssl
from dataclasses import replace

from cloud_server.checks import CHECKS
from cloud_server.checks.facts import Facts
from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_json
from cloud_server.deployment import ANY_ADDRESS, Deployment
from cloud_server.health import gather
from cloud_server.layout import is_locked
from cloud_server.remedies import prescribe
from process.health import Finding, exit_code, with_remedies

CONNECT_SECONDS = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    add_state(parser)
    add_json(parser)
    parser.set_defaults(handler=_check)


def _check(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        findings = check(deployment)
    if options.json:
        print_json([finding.as_dict() for finding in findings])
    else:
        for finding in findings:
            print("\n".join(finding.lines()))
    return exit_code(findings)


def check(deployment: Deployment) -> list[Finding]:
    """The findings, in the order in which one would look; what the service does by itself stands with them."""
    limits = deployment.settings.health
    is_running = is_locked(deployment.folder.lock("service"))
    facts = gather(deployment)
    facts = _with_broker(deployment, facts, is_running=is_running)
    findings = [each.judge(facts, limits) for each in CHECKS]
    if limits.remedies == "on":
        findings = with_remedies(findings, prescribe(facts, limits))
    hint = f"start it: shoal-cloud run --state {deployment.folder.root}"
    service = (
        Finding("service", "ok", "runs") if is_running else Finding("service", "warn", "not running", hint)
    )
    return [*findings, service]


def _with_broker(deployment: Deployment, facts: Facts, *, is_running: bool) -> Facts:
    """Reaches the broker's port, with TLS where it is spoken; a session would end the service's own."""
    broker = deployment.settings.broker
    if broker.kind != "external" and (not is_running or not broker.port):
        return replace(facts, broker_detail="starts with the service")
    host = "127.0.0.1" if broker.host in ANY_ADDRESS else broker.host
    where = f"{host}:{broker.port}"
    try:
        with socket.create_connection((host, broker.port), CONNECT_SECONDS) as plain:
            if not broker.tls:
                return replace(facts, broker_detail=f"{where} accepts connections")
            context = ssl.create_default_context(cadata=deployment.authorities.bundle_pem)
            # The broker's name is whatever devices call it by; that it is ours shows in who signed it.
            context.check_hostname = False
            with context.wrap_socket(plain) as secured:
                return replace(facts, broker_detail=f"{where} accepts connections, {secured.version()}")
    except ssl.SSLError as error:
        return replace(facts, broker_trouble=f"{where}: no TLS: {error.reason or error}")
    except OSError as error:
        return replace(facts, broker_trouble=f"{where}: {error.strerror or error}")
