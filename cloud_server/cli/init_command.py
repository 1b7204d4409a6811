"""`shoal-cloud init`: a state folder with settings, keys, CA, database and an empty signed repository."""

from __future__ import annotations

import argparse
import os
from typing import TypeVar

import msgspec

from cloud_server.cli import add_state
from cloud_server.cli.output import say
from cloud_server.deployment import initialise
from cloud_server.settings import BrokerSettings, CloudSettings, OperatorSettings, load_cloud_settings
from process.arguments import path
from process.settings import check_settings
from wire.errors import ConfigurationError

OPERATORS = "127.0.0.1:8445"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
S = TypeVar("S", bound=msgspec.Struct)


def configure(parser: argparse.ArgumentParser) -> None:
    defaults = CloudSettings()
    listen, broker = defaults.listen, defaults.broker
    add_state(parser)
    parser.add_argument("--settings", type=path, metavar="FILE", help="settings to begin with, as TOML")
    parser.add_argument(
        "--keys",
        type=path,
        metavar="DIR",
        help="keys that `shoal-cloud keys init DIR` made, perhaps elsewhere",
    )
    parser.add_argument("--tenant", metavar="ID", help=f"who runs the fleet ({defaults.tenant})")
    parser.add_argument("--fleet", metavar="ID", help=f"the fleet ({defaults.fleet})")
    parser.add_argument("--host", metavar="ADDRESS", help=f"address to listen on ({listen.host})")
    parser.add_argument("--advertise", metavar="HOST", help="host name that devices use, if it is another")
    parser.add_argument("--public-port", type=int, metavar="PORT", help=f"enrolment ({listen.public_port})")
    parser.add_argument("--device-port", type=int, metavar="PORT", help=f"devices ({listen.device_port})")
    parser.add_argument(
        "--broker", metavar="KIND", help=f"embedded, mosquitto, auto or external ({broker.kind})"
    )
    parser.add_argument("--broker-host", metavar="HOST", help=f"address of the broker ({broker.host})")
    parser.add_argument("--broker-port", type=int, metavar="PORT", help=f"port of the broker ({broker.port})")
    parser.add_argument(
        "--broker-tls",
        action="store_true",
        default=None,
        help="mutual TLS to the broker, with access rules for each device (mosquitto and external)",
    )
    parser.add_argument(
        "--operators",
        metavar="HOST:PORT",
        default=OPERATORS,
        help=f"where the operators' interface answers; empty for nowhere ({OPERATORS})",
    )
    parser.set_defaults(handler=_init)


def _init(options: argparse.Namespace) -> int:
    settings = _settings(options)
    initialise(options.state, settings, keys=options.keys).close()
    say(f"made {options.state} for {settings.tenant}/{settings.fleet}")
    say(f"keep {options.state / 'keys' / 'offline'} somewhere safe: it signs what devices trust")
    say(f"{options.state / 'admin.token'} is the first admin's token: take it away, and delete it there")
    say(f"next: shoal-cloud model import BUNDLE --state {options.state}")
    say(f"      shoal-cloud device add NAME --state {options.state}")
    say(f"      shoal-cloud run --state {options.state}")
    return 0


def _settings(options: argparse.Namespace) -> CloudSettings:
    base = load_cloud_settings(options.settings, os.environ) if options.settings else CloudSettings()
    listen = _changed(
        base.listen,
        host=options.host,
        advertise=options.advertise,
        public_port=options.public_port,
        device_port=options.device_port,
    )
    broker = _changed(
        base.broker,
        kind=options.broker,
        host=options.broker_host,
        port=options.broker_port,
        tls=options.broker_tls,
    )
    operators = base.operators if options.settings else OperatorSettings(listen=options.operators)
    settings = _changed(
        base, tenant=options.tenant, fleet=options.fleet, listen=listen, broker=broker, operators=operators
    )
    settings = check_settings(settings, "the command line")
    _check_broker(settings.broker)
    return settings


def _check_broker(broker: BrokerSettings) -> None:
    """What `shoal-cloud run` would refuse, while there is nothing to take back."""
    if broker.kind == "embedded" and broker.tls:
        raise ConfigurationError(
            "the embedded broker verifies no certificates", hint="use --broker mosquitto with --broker-tls"
        )
    if broker.kind != "external" and not broker.tls and broker.host not in LOOPBACK:
        raise ConfigurationError(
            f"without TLS a broker lets everybody in, and does not listen on {broker.host}",
            hint="use --broker mosquitto with --broker-tls, or --broker-host 127.0.0.1",
        )


def _changed(section: S, **given: object) -> S:
    """The section with what was given on the command line."""
    return msgspec.structs.replace(
        section, **{key: value for key, value in given.items() if value is not None}
    )
