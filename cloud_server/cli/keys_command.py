"""`shoal-cloud keys`: make, show, rotate, sign again; when signatures end."""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_json, print_table, say
from cloud_server.cli.signing import add_request, read_signed, write_request
from cloud_server.db.audit import append_audit
from cloud_server.deployment import Deployment
from cloud_server.enrolment.authorities import Authorities
from cloud_server.enrolment.ca import CertificateAuthority
from cloud_server.enrolment.takeover import retire_authority, rotate_authority
from cloud_server.keys import init_keys
from cloud_server.release.expiry import DAY, judge_expiries
from cloud_server.release.rotation import ROTATED, Rotation
from process.arguments import path
from wire.primitives import KEM_ALGORITHMS

AUTHORITY = "ca"
_SHOWN = ("role", "key_id", "place", "state")
_EXPIRY = ("role", "expires", "days_left", "is_due", "what_to_do")


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    init = actions.add_parser("init", help="make the keys of a new aggregator, on another machine perhaps")
    init.add_argument("folder", type=path, help="a new folder; then shoal-cloud init --keys FOLDER")
    init.add_argument(
        "--kem", choices=KEM_ALGORITHMS, default=KEM_ALGORITHMS[0], help="what updates are sealed with"
    )
    init.set_defaults(handler=_init)
    show = actions.add_parser("show", help="every key: what it is for, where it is, whether it counts")
    show.set_defaults(handler=_show)
    expiry = actions.add_parser("expiry", help="when the signatures that devices trust end")
    expiry.set_defaults(handler=_expiry)
    rotate = actions.add_parser("rotate", help="replace a key; devices follow by themselves")
    rotate.add_argument(
        "role", choices=(*ROTATED, AUTHORITY), metavar="ROLE", help=", ".join((*ROTATED, AUTHORITY))
    )
    rotate.add_argument(
        "--stolen", action="store_true", help="the key before counts no more from now on (order, kem and ca)"
    )
    rotate.add_argument("--share", type=int, choices=(1, 2, 3), default=0, help="which share of root")
    rotate.add_argument(
        "--replaces", default="", metavar="KEY", help="id of the key to replace, if its file is lost"
    )
    rotate.add_argument("--kem", choices=KEM_ALGORITHMS, default="", help="another algorithm (kem only)")
    rotate.add_argument(
        "--signer", default="", metavar="URI", help="the new key is in an HSM or a KMS: its URI"
    )
    rotate.add_argument(
        "--public-key", type=path, metavar="FILE", help="its public half, JSON of securesystemslib"
    )
    rotate.set_defaults(handler=_rotate)
    ended = actions.add_parser("retire", help="end the overlap of two certificate authorities")
    ended.add_argument("role", choices=(AUTHORITY,), metavar="ROLE", help=AUTHORITY)
    ended.add_argument(
        "--now", action="store_true", help="also while devices have certificates of the older one only"
    )
    ended.set_defaults(handler=_retire)
    sign = actions.add_parser("sign", help="sign an offline role for another life")
    sign.add_argument("role", choices=("root", "targets"), metavar="ROLE", help="root or targets")
    add_request(sign)
    sign.set_defaults(handler=_sign)
    for command in (rotate, sign, show):
        command.add_argument(
            "--offline",
            type=path,
            metavar="DIR",
            help="where the offline keys are (keys/offline of the state folder)",
        )
    for command in (show, expiry, rotate, ended, sign):
        add_state(command)
        add_json(command)


def _init(options: argparse.Namespace) -> int:
    init_keys(options.folder, kem_algorithm=options.kem)
    say(
        f"made {options.folder}: keep {options.folder / 'offline'} somewhere safe, its shares apart from each other"
    )
    say(f"next: shoal-cloud init --keys {options.folder}")
    return 0


def _show(options: argparse.Namespace) -> int:
    with _open(options) as deployment:
        rows = Rotation(deployment.key_folder, deployment.repository, deployment.clock).table()
        rows += _authority_rows(deployment.authorities)
    _print(options, rows, _SHOWN)
    return 0


def _expiry(options: argparse.Namespace) -> int:
    with _open(options) as deployment:
        repository = deployment.repository
        judged = judge_expiries(repository.expiries(), repository.expiry, deployment.clock.now())
    rows = [
        {
            "role": each.role,
            "expires": each.expires,
            "days_left": round(each.left_seconds / DAY, 2),
            "is_due": each.is_due,
            "what_to_do": each.what_to_do if each.is_due else "",
        }
        for each in judged
    ]
    _print(options, rows, _EXPIRY)
    return 0


def _authority_rows(authorities: Authorities) -> list[dict[str, Any]]:
    def state(authority: CertificateAuthority) -> str:
        if authority is authorities.issuing:
            return "counts"
        return "listed" if authority is authorities.trusted[0] else "still counts"

    return [
        {"role": AUTHORITY, "key_id": each.fingerprint, "place": "here", "state": state(each)}
        for each in authorities.trusted
    ]


def _rotate(options: argparse.Namespace) -> int:
    if options.role == AUTHORITY:
        return _rotate_authority(options)
    public = options.public_key.read_bytes() if options.public_key else b""
    with _open(options) as deployment:
        rotation = Rotation(deployment.key_folder, deployment.repository, deployment.clock)
        settings = deployment.settings
        if options.role in ("order", "kem"):
            done = rotation.rotate_online(
                options.role,
                tenant=settings.tenant,
                fleet=settings.fleet,
                is_stolen=options.stolen,
                algorithm=options.kem,
            )
        else:
            done = rotation.rotate_role(
                options.role,
                share=options.share,
                replaced=options.replaces,
                signer=options.signer,
                public=public,
            )
        _note(deployment, "key.rotated", {"role": options.role, "key": done.key_id, "stolen": options.stolen})
    if options.json:
        print_json({"role": options.role, "key_id": done.key_id, "place": done.place})
    say(f"{options.role} is signed by {done.key_id[:16]} ({done.place}); {done.what_follows}")
    return 0


def _rotate_authority(options: argparse.Namespace) -> int:
    with _open(options) as deployment:
        done = rotate_authority(deployment, is_stolen=options.stolen)
        _note(deployment, "key.rotated", {"role": "ca", "key": done.fingerprint, "stolen": options.stolen})
        is_external = deployment.settings.broker.kind == "external"
    if options.json:
        print_json({"role": AUTHORITY, "key_id": done.fingerprint, "may_retire_at": done.may_retire_at})
    say(f"the authority {done.fingerprint[:16]} is listed; devices hear of it by the signed metadata")
    if options.stolen:
        say(
            f"the one before counts no more: {done.left_behind} devices renew by their update key, by themselves"
        )
        say("tokens that were not used pin it, too: make new ones (shoal-cloud device add)")
    else:
        when = datetime.fromtimestamp(done.may_retire_at, tz=UTC).isoformat(timespec="minutes")
        say("it signs from tomorrow on, while the one before still counts")
        say(f"next: shoal-cloud keys retire ca, from {when} on")
    if is_external:
        say("the broker that you run needs its files anew: shoal-cloud broker config --force, and a restart")
    return 0


def _retire(options: argparse.Namespace) -> int:
    with _open(options) as deployment:
        done = retire_authority(deployment, now=options.now)
        _note(deployment, "key.retired", {"role": "ca", "key": done.fingerprint})
        is_external = deployment.settings.broker.kind == "external"
    if options.json:
        print_json({"role": AUTHORITY, "key_id": done.fingerprint, "left_behind": done.left_behind})
    say(
        f"{done.fingerprint[:16]} is the only authority now; {done.left_behind} devices renew by their update key"
    )
    if is_external:
        say("the broker that you run needs its files anew: shoal-cloud broker config --force, and a restart")
    return 0


def _sign(options: argparse.Namespace) -> int:
    signed = read_signed(options)
    with _open(options) as deployment:
        if options.request is not None:
            request = deployment.repository.request_again(options.role, fleet=deployment.full_name)
            return write_request(options, request)
        deployment.repository.sign_again(options.role, signed=signed)
        expires = deployment.repository.expiries()[options.role]
        _note(deployment, "role.signed", {"role": options.role})
    if options.json:
        print_json({"role": options.role, "expires": expires})
    where = "as the request says" if signed is not None else "put the offline keys back into their safe"
    say(f"signed {options.role} again; {where}")
    return 0


def _open(options: argparse.Namespace) -> Deployment:
    offline: Path | None = getattr(options, "offline", None)
    return Deployment.open(options.state, os.environ, offline=offline)


def _note(deployment: Deployment, kind: str, body: dict[str, Any]) -> None:
    with deployment.database.transaction() as connection:
        append_audit(connection, kind, deployment.clock.now(), body)


def _print(options: argparse.Namespace, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    if options.json:
        print_json(rows)
    else:
        print_table(rows, columns)
