"""`shoal-cloud helper`: the second server of secure aggregation, in the hands of another party than the aggregator.

Law of the file: `trust` is the aggregator's own command; all others work on a helper's folder and touch nothing of an
aggregator's.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, Final

from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_facts, print_json, print_table, say
from process.arguments import path
from process.clock import SystemClock
from process.settings import check_settings
from wire.errors import ConfigurationError, ShoalError, TrustError
from wire.primitives import KEM_ALGORITHMS, VerifyKey

DEFAULT_FOLDER: Final = "/var/lib/shoal-helper"
_COLUMNS: Final = ("device", "key", "added_at")
_LINE: Final = re.compile(r"([A-Za-z0-9_-]{1,64})[\s,]+([0-9a-fA-F]{64})")
_MAX_IMPORT_BYTES: Final = 16 * 2**20


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _configure_init(actions.add_parser("init", help="make a helper's folder and keys"))
    run = actions.add_parser("run", help="answer the aggregator's questions")
    run.set_defaults(handler=_run)
    show = actions.add_parser("show", help="the helper at a glance, and its public key")
    show.set_defaults(handler=_show)
    add_json(show)
    device = actions.add_parser("device", help="whose masks this helper sums")
    _configure_device(device)
    trust = actions.add_parser(
        "trust", help="at the aggregator: let devices know a helper, by the offline key"
    )
    trust.add_argument("file", type=path, help="helper.json, from who runs the helper")
    trust.add_argument("--offline", type=path, metavar="DIR", help="where the targets key is")
    trust.set_defaults(handler=_trust)
    add_state(trust)
    for command in (run, show):
        _add_folder(command)


def _configure_init(init: argparse.ArgumentParser) -> None:
    init.add_argument("--tenant", default="shoal", metavar="ID", help="who runs the fleet (shoal)")
    init.add_argument("--fleet", default="fleet", metavar="ID", help="the fleet (fleet)")
    init.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (127.0.0.1)"
    )
    init.add_argument("--port", type=int, default=8446, metavar="PORT", help="port (8446)")
    init.add_argument(
        "--min-devices", type=int, default=10, metavar="K", help="fewest devices in a sum that is told (10)"
    )
    init.add_argument(
        "--kem", choices=KEM_ALGORITHMS, default=KEM_ALGORITHMS[0], help="what seeds are sealed with"
    )
    init.set_defaults(handler=_init)
    _add_folder(init)


def _configure_device(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="device_action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="take a device into the roster")
    add.add_argument("name", help="the device")
    add.add_argument("key", help="its update key (hex), from who runs the device: shoal-edge status --json")
    add.set_defaults(handler=_add)
    listed = actions.add_parser("import", help="take many: lines of a name and an update key")
    listed.add_argument("file", help="a file, or - for standard input")
    listed.set_defaults(handler=_import)
    remove = actions.add_parser("remove", help="take a device out of the roster")
    remove.add_argument("name", help="the device")
    remove.set_defaults(handler=_remove)
    table = actions.add_parser("list", help="the roster")
    add_json(table)
    table.set_defaults(handler=_list)
    for command in (add, listed, remove, table):
        _add_folder(command)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state",
        type=path,
        default=os.environ.get("SHOAL_STATE", DEFAULT_FOLDER),
        metavar="DIR",
        help=f"the helper's own folder (SHOAL_STATE, or {DEFAULT_FOLDER})",
    )


def _init(options: argparse.Namespace) -> int:
    from cloud_server.helper.folder import HelperFolder, HelperSettings

    given = HelperSettings(
        tenant=options.tenant,
        fleet=options.fleet,
        host=options.host,
        port=options.port,
        min_devices=options.min_devices,
    )
    settings, folder = check_settings(given, "the command line"), HelperFolder(options.state)
    folder.create(settings, algorithm=options.kem, now=SystemClock().now())
    say(
        f"made {folder.root} for {settings.tenant}/{settings.fleet}: sums of {settings.min_devices} devices or more"
    )
    say(f"give {folder.handed_out} to who runs the aggregator; its token lets in, keep no copy")
    say(f"next: shoal-cloud helper device import FILE --state {folder.root}")
    say(f"      shoal-cloud helper run --state {folder.root}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from cloud_server.helper.folder import HelperFolder
    from cloud_server.helper.serving import serve
    from process.logs import configure_logs
    from process.service_manager import ServiceManager

    folder = HelperFolder(options.state)
    log = folder.settings().log
    configure_logs("json" if log.json else "logfmt", log.level)
    return serve(folder, SystemClock(), manager=ServiceManager.of(os.environ))


def _show(options: argparse.Namespace) -> int:
    from cloud_server.helper.folder import HelperFolder

    folder = HelperFolder(options.state)
    settings, key, store = folder.settings(), folder.key().public_key, folder.open_store()
    answered, last = store.summary()
    facts: dict[str, Any] = {
        "tenant": settings.tenant,
        "fleet": settings.fleet,
        "key": key.public_bytes.hex(),
        "key_id": key.key_id.hex(),
        "min_devices": settings.min_devices,
        "devices": len(store.roster()),
        "answered_rounds": answered,
        "answered_at": last,
    }
    store.close()
    if options.json:
        print_json(facts)
    else:
        print_facts(facts)
    return 0


def _add(options: argparse.Namespace) -> int:
    return _take(options, [_device(f"{options.name} {options.key}", "the command line")])


def _import(options: argparse.Namespace) -> int:
    lines = _read(options.file).splitlines()
    wanted = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    return _take(
        options,
        [_device(line, f"line {number}") for number, line in wanted if line and not line.startswith("#")],
    )


def _take(options: argparse.Namespace, devices: list[tuple[str, bytes]]) -> int:
    from cloud_server.helper.folder import HelperFolder

    folder = HelperFolder(options.state)
    folder.settings()
    store = folder.open_store()
    try:
        new = store.add(devices, SystemClock().now())
        say(f"{new} of {len(devices)} devices are new in the roster, which has {len(store.roster())}")
    finally:
        store.close()
    return 0


def _remove(options: argparse.Namespace) -> int:
    from cloud_server.helper.folder import HelperFolder

    folder = HelperFolder(options.state)
    folder.settings()
    store = folder.open_store()
    try:
        if not store.remove(options.name):
            raise ConfigurationError(
                f"{options.name} is not in the roster", hint="shoal-cloud helper device list"
            )
    finally:
        store.close()
    say(f"{options.name} is out of the roster: its masks are summed no more")
    return 0


def _list(options: argparse.Namespace) -> int:
    from cloud_server.helper.folder import HelperFolder

    folder = HelperFolder(options.state)
    folder.settings()
    store = folder.open_store()
    rows = [{"device": row.device, "key": row.key.hex(), "added_at": row.added_at} for row in store.roster()]
    store.close()
    if options.json:
        print_json(rows)
    else:
        print_table(rows, _COLUMNS)
    return 0


def _trust(options: argparse.Namespace) -> int:
    from cloud_server.db.audit import append_audit
    from cloud_server.deployment import Deployment
    from cloud_server.secure.helper_client import read_helper_file

    with Deployment.open(options.state, os.environ, offline=options.offline) as deployment:
        settings = deployment.settings
        key = read_helper_file(options.file, tenant=settings.tenant, fleet=settings.fleet)
        deployment.repository.set_helper(options.file.read_bytes())
        with deployment.database.transaction() as connection:
            append_audit(connection, "helper.trusted", deployment.clock.now(), {"key": key.key_id.hex()})
    say(f"devices of {settings.tenant}/{settings.fleet} seal the seeds of their masks to {key.key_id.hex()}")
    say("put the offline keys back into their safe")
    return 0


def _device(line: str, where: str) -> tuple[str, bytes]:
    match = _LINE.fullmatch(line.strip())
    try:
        if match is not None:
            return match[1], VerifyKey(bytes.fromhex(match[2])).public_bytes
    except TrustError:
        pass
    raise ConfigurationError(f"{where} is not a device's name and its update key of 64 hex digits")


def _read(name: str) -> str:
    try:
        if name == "-":
            return sys.stdin.read(_MAX_IMPORT_BYTES)
        with Path(name).open(encoding="utf-8") as file:
            return file.read(_MAX_IMPORT_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> ShoalError:
    return ConfigurationError(f"{name} cannot be read: {error}", hint="one line a device: NAME KEY")
