"""`shoal-cloud privacy`: what differential privacy has spent, and whether its ledger is whole."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from cloud_server.cli import add_json, add_state
from cloud_server.cli.output import print_facts, print_json, print_table, say
from cloud_server.db.audit import append_audit
from cloud_server.db.engine import Connection
from cloud_server.db.privacy import ChargeRow, count_mechanisms, count_uncharged, load_charges
from cloud_server.deployment import Deployment
from cloud_server.privacy.accountant import Mechanism, epsilon_of, rounds_left
from cloud_server.privacy.budget import mechanism_for, mechanism_of
from cloud_server.privacy.keys import add_ledger_key, open_ledger_keys
from cloud_server.privacy.ledger import verify_ledger
from cloud_server.privacy.plan import PrivacyPlan
from process.arguments import whole_number

_COLUMNS = ("seq", "run", "round", "noise", "clip", "rate", "population", "cohort", "epsilon", "charged_at")
DEFAULT_LAST = 20


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="the budget, and what rounds were charged")
    show.add_argument(
        "--last",
        type=whole_number(1),
        default=DEFAULT_LAST,
        metavar="N",
        help=f"only the newest so many charges ({DEFAULT_LAST})",
    )
    show.set_defaults(handler=_show)
    verify = actions.add_parser("verify", help="check every charge's place, signature and audit entry")
    verify.set_defaults(handler=_verify)
    rotate = actions.add_parser(
        "rotate", help="replace the key that signs charges; older ones stay to verify"
    )
    rotate.set_defaults(handler=_rotate)
    for command in (show, verify, rotate):
        add_state(command)
        add_json(command)


def _show(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        facts = _facts(deployment)
        with deployment.database.read() as connection:
            rows = [_row(charge) for charge in load_charges(connection, last=options.last)]
    if options.json:
        print_json({**facts, "charges": rows})
        return 0
    print_facts(facts)
    if rows:
        print()
        print_table(rows, _COLUMNS)
    if facts["unbounded_rounds"]:
        say(f"warning: {facts['unbounded_rounds']} rounds ran without noise; epsilon says nothing of those")
    return 0


def _facts(deployment: Deployment) -> dict[str, Any]:
    settings = deployment.settings.privacy
    with deployment.database.read() as connection:
        spent, charges = _spent(connection), load_charges(connection, last=1)
        unbounded = count_uncharged(connection)
    plan = settings.plan() or PrivacyPlan()
    left = rounds_left(spent, mechanism_for(plan, 1), settings.epsilon, settings.delta)
    return {
        "mode": settings.mode,
        "budget_epsilon": settings.epsilon,
        "delta": settings.delta,
        "spent_epsilon": epsilon_of(spent, settings.delta),
        "charged_rounds": charges[-1].seq if charges else 0,
        "rounds_left": left if settings.mode != "none" else 0,
        "unbounded_rounds": unbounded,
    }


def _spent(connection: Connection) -> list[tuple[Mechanism, int]]:
    return [(mechanism_of(*row[:3]), row[3]) for row in count_mechanisms(connection)]


def _row(charge: ChargeRow) -> dict[str, Any]:
    return {
        "seq": charge.seq,
        "run": charge.run,
        "round": charge.round,
        "mode": charge.mode,
        "noise": charge.noise_multiplier,
        "clip": charge.clipping_norm,
        "rate": charge.sampling_rate,
        "population": charge.population,
        "cohort": charge.cohort,
        "epsilon": charge.epsilon,
        "delta": charge.delta,
        "charged_at": charge.at,
    }


def _verify(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        with deployment.database.read() as connection:
            is_new = not load_charges(connection, last=1)
        count, key_id = 0, ""
        if not is_new:
            keys = open_ledger_keys(deployment.folder.keys, is_new=False)
            key_id = keys.signer.key_id.hex()
            with deployment.database.read() as connection:
                count = len(verify_ledger(connection, keys.verify_keys))
    if options.json:
        print_json({"charges": count, "key_id": key_id, "is_whole": True})
        return 0
    print(f"the privacy ledger is whole: {count} charges", file=sys.stderr)
    return 0


def _rotate(options: argparse.Namespace) -> int:
    with Deployment.open(options.state, os.environ) as deployment:
        with deployment.database.read() as connection:
            newest = load_charges(connection, last=1)
        signer = add_ledger_key(deployment.folder.keys).signer
        charges = newest[-1].seq if newest else 0
        facts = {"key": signer.key_id.hex(), "charges": charges}
        with deployment.database.transaction() as connection:
            append_audit(connection, "privacy.key_rotated", deployment.clock.now(), facts)
        deployment.notary.sign()
    if options.json:
        print_json({"key_id": signer.key_id.hex(), "public": signer.public_bytes.hex()})
    say(f"charges are signed by {signer.key_id.hex()} from number {charges + 1} on")
    return 0
