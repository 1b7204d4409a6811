"""`shoal-cloud device`: mint tokens, list and show devices, approve, deny, quarantine, revoke, rename.

Law of the file: a token reaches standard output or a file of mode 0600, and no log.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_facts, print_json, print_table, say
from cloud_server.db.devices import DeviceRow, PresenceRow
from cloud_server.deployment import Deployment
from cloud_server.enrolment.queue import is_pending
from cloud_server.enrolment.tokens import MAX_LIFE_SECONDS, MAX_USES, Door, free_names, mint_token
from cloud_server.operators.actions import erase_device
from process.arguments import path, whole_number
from wire.enrolment import EnrolmentToken
from wire.errors import ConfigurationError, StorageError
from wire.primitives import write_private

_COLUMNS = ("device", "label", "status", "presence", "release_version", "last_seen", "ring", "reason")
MAX_COUNT = 10_000
_URL = re.compile(r"https://[^/\s@?#]+")
_MAX_PORT = 65_535


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _configure_add(actions.add_parser("add", help="print a token that lets a device in"))
    table = actions.add_parser("list", help="all devices")
    table.add_argument("--pending", action="store_true", help="only those that wait for approval")
    table.set_defaults(handler=_list)
    show = actions.add_parser("show", help="one device")
    show.set_defaults(handler=_show)
    for command in (table, show):
        add_state(command)
        add_json(command)
    show.add_argument("device", metavar="NAME")
    for name, summary in (
        ("revoke", "end a device's trust for good"),
        ("quarantine", "keep a device out of rounds until it is approved again"),
        ("approve", "let devices take part: those that wait, or are in quarantine"),
        ("deny", "send devices away that wait for approval"),
    ):
        command = actions.add_parser(name, help=summary)
        command.add_argument("devices", nargs="+", metavar="NAME")
        if name != "approve":
            command.add_argument("--reason", default="", help="kept beside the device")
        add_state(command)
        command.set_defaults(handler=_change)
    rename = actions.add_parser("rename", help="give a device another label; its name is for ever")
    rename.add_argument("device", metavar="NAME")
    rename.add_argument("label", metavar="LABEL")
    add_state(rename)
    rename.set_defaults(handler=_rename)
    erase = actions.add_parser("erase", help="revoke a device and forget its name; the books stay whole")
    erase.add_argument("device", metavar="NAME")
    add_state(erase)
    erase.set_defaults(handler=_erase)


def _configure_add(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "device",
        nargs="?",
        metavar="NAME",
        help="the only name that the token lets in; cam-{n:03} with --count: cam-001 and so on; cam-* : every name that"
        " begins so; none: any free name, which the device chooses",
    )
    add.add_argument(
        "--count", type=whole_number(1, MAX_COUNT), default=1, metavar="N", help="make so many tokens (1)"
    )
    add.add_argument(
        "--uses",
        type=whole_number(1, MAX_USES),
        default=1,
        metavar="N",
        help="devices that one token lets in; more than one wait for approval (1)",
    )
    add.add_argument("--hours", type=_hours, metavar="H", help="life of a token (enrolment.token_hours)")
    add.add_argument(
        "--url", metavar="URL", help="https://host:port of enrolment, if devices see another one"
    )
    add.add_argument(
        "--approved", action="store_true", help="devices of a token with many uses take part without approval"
    )
    add.add_argument(
        "--output", type=path, metavar="FILE", help="write the tokens into a file (0600) instead"
    )
    add.add_argument(
        "--output-dir",
        type=path,
        metavar="DIR",
        help="write each token into a file of its own (0600), called by its device or number",
    )
    add_state(add)
    add_json(add)
    add.set_defaults(handler=_add)


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0.0 < hours <= MAX_LIFE_SECONDS / 3600.0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not from 0 up to {MAX_LIFE_SECONDS / 3600.0:.0f} hours"
        )
    return hours


def _add(options: argparse.Namespace) -> int:
    if options.device == "":
        raise ConfigurationError(
            "the name is empty: is a variable unset?", hint="leave NAME away for any name"
        )
    numbered = options.device is not None and "{" in options.device
    if options.device and options.count != 1 and not numbered and not options.device.endswith("*"):
        raise ConfigurationError(
            "a name is for one token", hint="cam-{n} numbers the names; or leave NAME or --count away"
        )
    if options.output is not None and options.output_dir is not None:
        raise ConfigurationError("the tokens have two places", hint="give --output or --output-dir")
    with Deployment.open(options.state, os.environ) as deployment:
        door, hours = _door(deployment, options.url), options.hours
        deployment.keys  # noqa: B018  without them no device that comes with a token could be let in
        now = deployment.clock.now()
        with deployment.database.transaction() as connection:
            names = (
                free_names(connection, options.device, options.count, now=now)
                if numbered
                else [options.device or ""] * options.count
            )
            tokens = [
                mint_token(
                    connection,
                    door,
                    now=now,
                    device=name,
                    uses=options.uses,
                    approves=True if options.approved else None,
                    life_seconds=(hours or deployment.settings.enrolment.token_hours) * 3600.0,
                )
                for name in names
            ]
            # Inside: a token that could not be handed over is not let in.
            _hand_over(tokens, options)
    say("on the device: shoal-edge enroll --token-file FILE (or `shoal-edge enroll -`, which reads it)")
    return 0


def _hand_over(tokens: list[EnrolmentToken], options: argparse.Namespace) -> None:
    if options.output is not None:
        write_private(options.output, "".join(f"{token}\n" for token in tokens).encode())
        say(f"wrote {len(tokens)} tokens to {options.output}")
    elif options.output_dir is not None:
        _write_each(tokens, options.output_dir)
        say(f"wrote {len(tokens)} tokens to {options.output_dir}")
    elif options.json:
        print_json([_token_facts(token) for token in tokens])
    else:
        for token in tokens:
            print(token)
    sys.stdout.flush()


def _write_each(tokens: list[EnrolmentToken], folder: Path) -> None:
    width = len(str(len(tokens)))
    files = [
        folder / f"{token.device or f'{number:0{width}d}'}.token" for number, token in enumerate(tokens, 1)
    ]
    taken = next((file for file in files if file.exists()), None)
    if taken is not None:
        raise ConfigurationError(
            f"{taken} is there already", hint="a token is never overwritten: name another folder"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the folder {folder} cannot be made: {error.strerror}") from error
    for file, token in zip(files, tokens, strict=True):
        write_private(file, f"{token}\n".encode())


def _door(deployment: Deployment, url: str | None) -> Door:
    if url is None:
        return deployment.door()
    port = url.rpartition(":")[2]
    if not _URL.fullmatch(url) or (port.isdecimal() and not 0 < int(port) <= _MAX_PORT):
        raise ConfigurationError(
            f"--url {url} is not an address of enrolment", hint="https://host:port, and nothing after it"
        )
    return Door(url, deployment.settings.listen.tls_name, deployment.authority.fingerprint)


def _token_facts(token: EnrolmentToken) -> dict[str, Any]:
    return {"token": str(token), "device": token.device, "expires": token.expires, "url": token.url}


def _list(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        presence = deployment.registry.presence()
        devices = [row for row in deployment.registry.devices() if not options.pending or is_pending(row)]
        rows = [_facts(row, presence.get(row.device)) for row in devices]
    if options.json:
        print_json(rows)
    else:
        print_table(rows, _COLUMNS)
    return 0


def _show(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        row = deployment.registry.show(options.device)
        facts = _facts(row, deployment.registry.presence().get(row.device))
    (print_json if options.json else print_facts)(facts)
    return 0


def _facts(row: DeviceRow, presence: PresenceRow | None) -> dict[str, Any]:
    return {
        "device": row.device,
        "label": row.label,
        "status": row.status,
        "reason": row.reason,
        "presence": presence.status if presence else "",
        "release_version": presence.release_version if presence else None,
        "agent_version": presence.agent_version if presence else "",
        "last_seen": presence.last_seen if presence else 0.0,
        "ring": row.ring,
        "strikes": row.strikes,
        "struck_at": row.struck_at,
        "probation_at": row.probation_at,
        "max_examples": row.max_examples,
        "node_id": row.node_id,
        "enrolled_at": row.enrolled_at,
        "certificate_serial": row.certificate_serial,
        "certificate_not_after": row.certificate_not_after,
        "update_key": row.update_key,
        "enrolled_with": row.token,
    }


def _change(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        registry = deployment.registry
        rows = [registry.show(device) for device in options.devices]  # a misspelt name changes nothing
        if options.action == "deny":
            others = [row.device for row in rows if not is_pending(row)]
            if others:
                raise ConfigurationError(
                    f"{others[0]} does not wait for approval", hint="to end a device's trust, revoke it"
                )
        for row in rows:
            if options.action == "approve":
                registry.approve(row.device)
            elif options.action == "quarantine":
                registry.quarantine(row.device, options.reason)
            else:
                registry.revoke(row.device, options.reason or ("denied" if options.action == "deny" else ""))
            say(f"{row.device} is {registry.status(row.device)}")
    return 0


def _rename(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        deployment.registry.rename(options.device, options.label)
    say(f"{options.device} is labelled {options.label!r}")
    return 0


def _erase(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        name = erase_device(deployment, options.device)
    say(f"the name is gone; what it did belongs to {name}")
    say("it is in older backups and logs, which end by themselves")
    return 0
