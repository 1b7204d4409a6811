"""`shoal-cloud audit`: whether the books are whole, what stands in them, and a copy for somebody else."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from cloud_server.audit.check import Anchor, Checked, Finding, ListedKey, check_chain, head_from_plain
from cloud_server.audit.export import check_export, write_export
from cloud_server.audit.notary import list_key, listed_keys
from cloud_server.audit.witness import read_witness
from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_facts, print_json, print_table, say
from cloud_server.db.audit import append_audit, load_audit, load_heads, newest_head
from cloud_server.db.privacy import load_charges
from cloud_server.deployment import Deployment
from cloud_server.keys import replace_audit_key
from cloud_server.operators.views import audit_entries
from cloud_server.privacy.keys import open_ledger_keys
from cloud_server.privacy.ledger import CHARGED, find_faults
from process.arguments import path, whole_number
from wire.errors import ConfigurationError, StorageError, TrustError
from wire.primitives import VerifyKey


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="whether every entry is there and unchanged, and heads agree")
    verify.add_argument(
        "--witness",
        type=path,
        metavar="FILE",
        help="heads that somebody else kept (audit.witness, if it is a file)",
    )
    verify.add_argument("--file", type=path, metavar="FILE", help="check an export instead of the database")
    verify.add_argument(
        "--key",
        action="append",
        metavar="HEX",
        help="public audit key to believe (those of the release metadata, or of the export); may be repeated",
    )
    verify.set_defaults(handler=_verify)
    export = actions.add_parser("export", help="write the chain and its heads as lines of JSON")
    export.add_argument("--output", type=path, required=True, metavar="FILE", help="must not exist yet")
    export.set_defaults(handler=_export)
    show = actions.add_parser("show", help="the newest entries")
    show.add_argument(
        "--last", type=whole_number(1), default=20, metavar="N", help="only the newest so many (20)"
    )
    show.add_argument("--kind", default="", help="only entries of this kind, such as ring.set")
    show.set_defaults(handler=_show)
    sign = actions.add_parser("sign", help="sign a head now, and tell the witness")
    sign.set_defaults(handler=_sign)
    rotate = actions.add_parser("rotate", help="replace the audit key; heads of the one before stay good")
    rotate.set_defaults(handler=_rotate)
    for command in (verify, export, show, sign, rotate):
        add_state(command)
        add_json(command)


def _verify(options: argparse.Namespace) -> int:
    keys = _given_keys(options.key)
    if options.file is not None:
        if options.witness is not None:
            raise ConfigurationError("an export is checked alone", hint="leave --file or --witness away")
        checked = check_export(options.file, keys)
    else:
        with Deployment.open(options.state, os.environ) as deployment:
            checked = verify_books(deployment, witness=options.witness, keys=keys)
    facts = facts_of(checked)
    (print_json if options.json else print_facts)(facts)
    if checked.findings:
        first = checked.findings[0]
        raise TrustError(
            first.what,
            hint="compare with a backup, an export or the witness; see docs/runbook.md",
            seq=first.seq,
        )
    return 0


def verify_books(
    deployment: Deployment, *, witness: Path | None = None, keys: dict[str, ListedKey] | None = None
) -> Checked:
    """Checks the database against itself, its signed heads, the release metadata and the witness's file."""
    repository = deployment.repository
    anchors = [
        Anchor(f"the release metadata of {name}", head_from_plain(json.loads(custom["audit"])))
        for name, custom in repository.anchors().items()
        if "audit" in custom
    ]
    told = deployment.settings.audit.witness
    if witness is None and told and "://" not in told and Path(told).exists():
        witness = Path(told)
    anchors += [] if witness is None else read_witness(witness)
    trusted = listed_keys(repository.audit_keys()) if keys is None else keys
    with deployment.database.read() as connection:
        checked = check_chain(load_audit(connection), load_heads(connection), trusted, anchors)
    checked.findings += _ledger_findings(deployment)
    return checked


def _ledger_findings(deployment: Deployment) -> list[Finding]:
    """Where the privacy ledger is not what the chain says of it."""
    with deployment.database.read() as connection:
        charges, told = load_charges(connection), list(load_audit(connection, kind=CHARGED))
    if not charges and not told:
        return []
    keys = open_ledger_keys(deployment.folder.keys, is_new=False).verify_keys
    return [Finding(fault.entry, fault.what) for fault in find_faults(charges, keys, told)]


def facts_of(checked: Checked) -> dict[str, Any]:
    """What `audit verify` prints."""
    return {
        "entries": checked.entries,
        "heads": checked.heads,
        "signed": checked.signed,
        "is_whole": not checked.findings,
        "findings": [finding.what for finding in checked.findings],
    }


def _given_keys(texts: list[str] | None) -> dict[str, ListedKey] | None:
    if not texts:
        return None
    try:
        found = [VerifyKey(bytes.fromhex(text)) for text in texts]
    except (ValueError, TrustError) as error:
        raise ConfigurationError("--key is no public key", hint="64 hex digits: an Ed25519 key") from error
    return {key.key_id.hex(): ListedKey(key) for key in found}


def _export(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        keys = listed_keys(deployment.repository.audit_keys())
        settings = deployment.settings
        try:
            with (
                options.output.open("x", encoding="utf-8") as out,
                deployment.database.read() as connection,
            ):
                count = write_export(
                    out,
                    about={"tenant": settings.tenant, "fleet": settings.fleet},
                    keys=keys,
                    entries=load_audit(connection),
                    heads=load_heads(connection),
                )
        except FileExistsError as error:
            raise ConfigurationError(
                f"{options.output} is there already", hint="name another file: nothing is overwritten"
            ) from error
        except OSError as error:
            raise StorageError(f"{options.output} cannot be written: {error.strerror}") from error
    if options.json:
        print_json({"file": str(options.output), "entries": count})
    say(f"wrote {count} entries to {options.output}")
    return 0


def _show(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment, deployment.database.read() as connection:
        rows = audit_entries(connection, last=options.last, kind=options.kind)
    if options.json:
        print_json(rows)
    else:
        print_table(rows, ("entry", "at", "kind", "facts"))
    return 0


def _sign(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        head = deployment.notary.sign()
        deployment.notary.tick()
        with deployment.database.read() as connection:
            kept = newest_head(connection)
    if head is None or kept is None:
        raise ConfigurationError(
            "there is nothing to sign yet", hint="the first device or model makes an entry"
        )
    if options.json:
        print_json({"entries": kept.seq, "hash": kept.hash, "key_id": kept.key_id, "at": kept.at})
    say(f"signed a head of {kept.seq} entries")
    return 0


def _rotate(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        before = deployment.notary.sign()
        key = replace_audit_key(deployment.folder.keys)
        list_key(deployment.repository, key, retired_at=0 if before is None else before.seq)
        now = deployment.clock.now()
        with deployment.database.transaction() as connection:
            append_audit(connection, "audit.key_rotated", now, {"key": key.key_id.hex()})
        head = deployment.notary.sign()
    if options.json:
        print_json({"key_id": key.key_id.hex(), "public": key.public_bytes.hex()})
    say(f"heads are signed by {key.key_id.hex()} from entry {1 if head is None else head.seq} on")
    return 0
