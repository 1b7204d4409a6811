"""A ledger that comes from a backup: what the lost life spent after it is charged before anything else happens.

Laws of the file: a private fleet does not go on from a backup before somebody says how many rounds were charged in all
(release metadata, where it outlived the database, says at least how many); each round that the backup does not know is
charged as the costliest kind that there was; noise of a round under way is never drawn again, because the lost life may
have shown it. Source: docs/runbook.md, "Backup and restore".
"""

from __future__ import annotations

from cloud_server.db.engine import Connection
from cloud_server.db.privacy import ChargeRow, count_mechanisms, delete_secrets, insert_charge, last_charge
from cloud_server.privacy.accountant import epsilon_of
from cloud_server.privacy.budget import mechanism_for, mechanism_of
from cloud_server.privacy.keys import LedgerKeys
from cloud_server.privacy.ledger import FIRST_PREV, anchor_charge, signed
from cloud_server.privacy.plan import PrivacyPlan
from wire.errors import ConfigurationError
from wire.messages import MAX_PARAMS

RESTORED = "restored"
MAX_LOST = 10_000
_HINT = (
    "say --charges N: how many rounds had been charged in all when the lost aggregator ended (`privacy show`,"
    " an export of the audit chain); if nobody knows, more than can have been"
)


def check_charges(known: int, said: int | None, anchored: int) -> int:
    """How many rounds the backup does not know of.

    Args:
        known: charges in the backup.
        said: charges in all, as the operator says; None if he says nothing.
        anchored: charges in all, as release metadata says that outlived the database; 0 for none.

    Raises:
        ConfigurationError: (operator) nothing was said, or fewer than there are for certain, or too many.
    """
    least = max(known, anchored)
    if said is None:
        raise ConfigurationError(
            f"this fleet has a privacy budget: the backup knows of {known} charged rounds, and of none after it",
            hint=_HINT,
            known=known,
        )
    if said < least:
        raise ConfigurationError(
            f"{said} charged rounds cannot be: there were {least} at least", hint=_HINT, least=least
        )
    if said - known > MAX_LOST:
        raise ConfigurationError(
            f"{said - known} rounds after the backup are too many to charge one by one",
            hint=f"at most {MAX_LOST}: with more, the budget is spent; begin another fleet",
            limit=MAX_LOST,
        )
    return said - known


def charge_lost_rounds(
    connection: Connection, keys: LedgerKeys, plan: PrivacyPlan, lost: int, *, incarnation: int, now: float
) -> float:
    """Charges rounds that nobody knows more of, and destroys the secrets of rounds under way.

    Args:
        plan: of the settings; the lost rounds may have had it.

    Returns:
        Epsilon after them, at the plan's delta; 0 where there was nothing to charge.

    Raises:
        MissingExtraError: (operator) there is nothing to compute epsilon with.
    """
    delete_secrets(connection)
    if not lost:
        return 0.0
    # Less noise and a larger rate than any round had cost more than every one of them.
    counted = count_mechanisms(connection)
    stated = mechanism_for(plan, MAX_PARAMS)
    noise = min([stated.noise_multiplier, *(row[0] for row in counted)])
    rate = max([stated.sampling_rate, *(row[1] for row in counted)])
    spent = [(mechanism_of(*row[:3]), row[3]) for row in counted]
    epsilon = epsilon_of([*spent, (mechanism_of(noise, rate, RESTORED), lost)], plan.delta)
    last = last_charge(connection)
    seq, prev = (0, FIRST_PREV) if last is None else last
    for number in range(1, lost + 1):
        row = ChargeRow(
            seq=seq + number,
            run=f"{RESTORED}-{incarnation}",
            round=number,
            mode=RESTORED,
            noise_multiplier=noise,
            clipping_norm=plan.clipping_norm,
            sampling_rate=rate,
            population=0,
            cohort=0,
            epsilon=epsilon,
            delta=plan.delta,
            secret_sha256=FIRST_PREV,
            at=now,
            prev=prev,
            hash="",
            key_id="",
            signature="",
        )
        row = signed(row, keys.signer)
        insert_charge(connection, row)
        anchor_charge(connection, row, now)
        prev = row.hash
    return epsilon
