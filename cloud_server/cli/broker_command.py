"""`shoal-cloud broker`: the files of a broker that an operator runs himself.

Laws of the file: the configuration comes from the same code as that of the broker which the aggregator starts
(`wire/transport/broker_configuration.py`); nothing is overwritten that was not meant to be; a folder is whole or was
not touched. Source: docs/how-to/run-with-mosquitto.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_json, say
from cloud_server.db.devices import load_revoked_serials
from cloud_server.deployment import ANY_ADDRESS, Deployment
from cloud_server.enrolment.ca import certificate_ends, ensure_server_files, refresh_revocation_list
from cloud_server.registry import AGGREGATOR_NAME
from process.arguments import path, whole_number
from wire.errors import ConfigurationError, StorageError
from wire.primitives import write_private
from wire.transport.broker_access import mosquitto_access
from wire.transport.broker_configuration import (
    BrokerLimits,
    BrokerSite,
    BrokerTls,
    mosquitto_configuration,
)

CONFIGURATION, ACCESS, AUTHORITY, REVOKED = "mosquitto.conf", "access", "ca.pem", "revoked.crl"
CERTIFICATE, KEY = "broker.pem", "broker.key"
DEFAULT_FOLDER = "mosquitto"
DEFAULT_PORT = 8883
_DEFAULTS = BrokerLimits()


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _configure_config(
        actions.add_parser("config", help="write the files of a mosquitto that you run yourself")
    )
    revoked = actions.add_parser("revoked", help="write the list of revoked certificates anew")
    revoked.add_argument(
        "--out", type=path, default=Path(DEFAULT_FOLDER) / REVOKED, metavar="FILE", help="the list's file"
    )
    revoked.set_defaults(handler=_revoked)
    for command in actions.choices.values():
        add_state(command)
        add_json(command)


def _configure_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=path, default=Path(DEFAULT_FOLDER), metavar="DIR", help=f"folder ({DEFAULT_FOLDER})"
    )
    command.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help="name or address by which it is reached, for its certificate; may be repeated",
    )
    command.add_argument(
        "--listen", default="0.0.0.0", metavar="ADDRESS", help="address to listen on (0.0.0.0)"
    )
    command.add_argument(
        "--port",
        type=whole_number(1, 65_535),
        help=f"port to listen on (that of the settings for an external broker, else {DEFAULT_PORT})",
    )
    command.add_argument(
        "--install-dir", type=path, metavar="DIR", help="where the folder will lie on the broker's machine"
    )
    command.add_argument(
        "--user", default="mosquitto", metavar="NAME", help="whom it becomes when root starts it (mosquitto)"
    )
    command.add_argument(
        "--persistence",
        choices=("interval", "change", "off"),
        default="interval",
        help="when sessions and queues are written to the disk (interval: every 30 s)",
    )
    command.add_argument(
        "--memory",
        type=whole_number(16, 1_048_576),
        default=_DEFAULTS.memory_bytes // 2**20,
        metavar="MIB",
        help=f"most memory that it takes ({_DEFAULTS.memory_bytes // 2**20})",
    )
    command.add_argument("--force", action="store_true", help="write over what lies there; makes a new key")
    command.set_defaults(handler=_config)


def _config(options: argparse.Namespace) -> int:
    out: Path = options.out
    if not options.force and out.exists() and any(_entries(out)):
        raise ConfigurationError(f"{out} is not empty", hint="--force writes over it, and makes a new key")
    _check_words(options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".broker-", dir=out.parent) as scratch:
            staged = Path(scratch)
            with Deployment.open(options.state, os.environ) as deployment:
                facts = _fill(staged, deployment, options)
            _move(staged, out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror}", path=str(out)) from error
    if options.json:
        print_json(facts)
    _tell(facts, options)
    return 0


def _fill(staged: Path, deployment: Deployment, options: argparse.Namespace) -> dict[str, Any]:
    settings, now = deployment.settings, deployment.clock.now()
    names = _names(deployment, options.host)
    ensure_server_files(deployment.authority, staged, "broker", names, now=now)
    write_private(staged / AUTHORITY, deployment.authorities.bundle_pem.encode("ascii"))
    _refresh(deployment, staged / REVOKED)
    place: Path = (options.install_dir or options.out).absolute()
    tls = BrokerTls(
        ca_file=place / AUTHORITY,
        certificate_file=place / CERTIFICATE,
        key_file=place / KEY,
        tenant=settings.tenant,
        fleet=settings.fleet,
        aggregators=(AGGREGATOR_NAME,),
        revocation_file=place / REVOKED,
    )
    configured = settings.broker.port if settings.broker.kind == "external" else 0
    site = BrokerSite(
        options.listen,
        options.port or configured or DEFAULT_PORT,
        data=place,
        access_file=place / ACCESS,
        user=options.user,
        persistence=options.persistence,
        is_talkative=True,
    )
    limits = BrokerLimits(memory_bytes=options.memory * 2**20)
    access = mosquitto_access(tls.tenant, tls.fleet, tls.aggregators)
    write_private(staged / ACCESS, access.encode("utf-8"))
    write_private(staged / CONFIGURATION, mosquitto_configuration(site, limits, tls).encode("utf-8"))
    return {
        "folder": str(options.out.absolute()),
        "installed_at": str(place),
        "files": sorted(entry.name for entry in staged.iterdir()),
        "listen": options.listen,
        "port": site.port,
        "names": names,
        "user": options.user,
        "certificate_not_after": certificate_ends(staged)["broker"],
        "settings": {"kind": "external", "host": names[-1], "port": site.port, "tls": True},
    }


def _names(deployment: Deployment, given: list[str]) -> list[str]:
    """The names in the broker's certificate: devices check the first, the aggregator the one in its settings."""
    names = [deployment.settings.listen.tls_name]
    names += given or [
        host for host in (deployment.advertised, deployment.settings.broker.host) if host not in ANY_ADDRESS
    ]
    if any(not name or any(letter.isspace() for letter in name) or name in ANY_ADDRESS for name in names):
        raise ConfigurationError(
            "the broker cannot be reached by that name", hint="--host takes a host name or an address"
        )
    return list(dict.fromkeys(names))


def _check_words(options: argparse.Namespace) -> None:
    """Nothing that is written into a line of the configuration may begin another."""
    words = {
        "--listen": options.listen,
        "--user": options.user,
        "--install-dir": str(options.install_dir or ""),
        "--out": str(options.out),
    }
    for option, word in words.items():
        if not word.isprintable() or (option in ("--listen", "--user") and (not word or " " in word)):
            raise ConfigurationError(f"{option} cannot be {word[:80]!a}", hint="use a plain word or path")


def _move(staged: Path, out: Path) -> None:
    """All files into the folder; the configuration comes last, and names the others."""
    out.mkdir(mode=0o700, exist_ok=True)
    for name in (AUTHORITY, REVOKED, KEY, CERTIFICATE, ACCESS, CONFIGURATION):
        shutil.move(staged / name, out / name)


def _entries(out: Path) -> list[str]:
    if not out.is_dir():
        raise ConfigurationError(f"{out} is not a folder", hint="name another with --out")
    return os.listdir(out)


def _tell(facts: dict[str, Any], options: argparse.Namespace) -> None:
    place, host = facts["installed_at"], facts["settings"]["host"]
    say(f"wrote {facts['folder']}: {', '.join(facts['files'])}")
    say("next, on the broker's machine, as root:")
    if facts["folder"] != place:
        say(f"      copy the folder to {place}")
    say(f"      chown -R {options.user}: {place}")
    say(f"      mosquitto -c {place}/{CONFIGURATION}")
    say(f'then, in {options.state}/settings.toml: [broker] kind = "external", host = "{host}",')
    say(f"      port = {facts['port']}, tls = true; and start the aggregator again")
    say(
        f"after a device is revoked: shoal-cloud broker revoked --state {options.state} --out {place}/{REVOKED}"
    )
    say("      and SIGHUP to mosquitto")


def _revoked(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        serials, is_new = _refresh(deployment, options.out)
    if options.json:
        print_json({"file": str(options.out.absolute()), "revoked": serials, "written": is_new})
    say(f"{options.out} names {len(serials)} revoked certificates{'' if is_new else ' already'}")
    if is_new:
        say("next: SIGHUP makes mosquitto read it (systemctl reload mosquitto)")
    return 0


def _refresh(deployment: Deployment, file: Path) -> tuple[list[str], bool]:
    now = deployment.clock.now()
    with deployment.database.read() as connection:
        serials = sorted(load_revoked_serials(connection, now))
    return serials, refresh_revocation_list(deployment.authorities.trusted, file, serials, now=now)
