"""What may still be spent: a round is charged in the transaction that opens it, before anything of it is drawn.

Laws of the file: a round that would cross the budget is not opened; what is charged stays charged, whether the round
moves the head, fails or is interrupted (no statement takes a charge back); cohort and noise come from one secret, which
is committed with the charge, so that a restart draws the same again and nobody can choose between two; the secret ends
with the round. The budget is that of the fleet's data: another run does not begin anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from cloud_server.db.engine import Connection, Database
from cloud_server.db.privacy import (
    ChargeRow,
    count_mechanisms,
    delete_secret,
    insert_charge,
    insert_secret,
    last_charge,
    load_charge,
    load_secret,
)
from cloud_server.privacy.accountant import Mechanism, epsilon_of
from cloud_server.privacy.distributed import accounted_multiplier
from cloud_server.privacy.keys import LedgerKeys
from cloud_server.privacy.ledger import FIRST_PREV, anchor_charge, signed, verify_ledger
from cloud_server.privacy.plan import PrivacyPlan
from process.logs import get_logger
from wire.discrete_gaussian import SEED_BYTES
from wire.errors import BudgetError, RoundError
from wire.primitives import random_bytes

CENTRAL, DISTRIBUTED = "central", "distributed"
EXHAUSTED = "exhausted"
"""Status of a run whose next round would cross the budget."""
_log = get_logger("cloud.privacy")


def _drawn(_round_number: int) -> bytes:
    return random_bytes(SEED_BYTES)


@dataclass(frozen=True, slots=True)
class PrivateRun:
    """What a private run is given.

    Attributes:
        keys: gives the keys that sign the ledger, as they are now: a command may replace them while the service runs.
        draw_secret: 32 bytes for a round, from a good source; another one than the default only where nobody's
            privacy is at stake (a simulation that must repeat itself).
    """

    plan: PrivacyPlan
    keys: Callable[[], LedgerKeys]
    draw_secret: Callable[[int], bytes] = _drawn


@dataclass(frozen=True, slots=True)
class Opening:
    """A round that may be opened: what it will be charged."""

    round_number: int
    population: int
    secret: bytes
    epsilon: float


@dataclass(frozen=True, slots=True)
class Charged:
    """A round under way: its charge, as it was committed, and its secret."""

    charge: ChargeRow
    secret: bytes


class Budget:
    """The budget of one run's fleet.

    Args:
        size: P.

    Raises:
        TrustError: (disk or an intruder) the ledger does not verify.
        MissingExtraError: (operator) there is nothing to compute epsilon with.
    """

    def __init__(self, database: Database, run: str, private: PrivateRun, size: int) -> None:
        self._mechanism = mechanism_for(private.plan, size)
        self._database = database
        self._run = run
        self._private = private
        self._opening: Opening | None = None
        with database.read() as connection:
            charges = verify_ledger(connection, private.keys().verify_keys)
            spent = self._epsilon(connection)
        plan = private.plan
        _log.info("privacy_ledger_verified", charges=len(charges), epsilon=spent, budget=plan.epsilon)

    @property
    def plan(self) -> PrivacyPlan:
        return self._private.plan

    @property
    def opening(self) -> Opening:
        """The round that is being opened.

        Raises:
            RoundError: (us) `prepare` was not called.
        """
        if self._opening is None:
            raise RoundError("no private round is being opened")
        return self._opening

    def prepare(self, round_number: int, population: int) -> None:
        """Decides whether the next round may be opened, and draws its secret; nothing is committed yet.

        Args:
            population: how many devices the cohort will be drawn from.

        Raises:
            BudgetError: (operator) it would cross the budget (`epsilon`, `limit`).
        """
        plan = self.plan
        with self._database.read() as connection:
            epsilon = self._epsilon(connection, self._mechanism)
        if not epsilon <= plan.epsilon:
            raise BudgetError(
                f"round {round_number} would bring epsilon to {epsilon:.4g} of {plan.epsilon:.4g}"
                f" at delta {plan.delta:g}",
                hint="the privacy budget is spent: publish what there is, or raise privacy.epsilon and start again",
                epsilon=epsilon,
                limit=plan.epsilon,
            )
        secret = self._private.draw_secret(round_number)
        self._opening = Opening(round_number, population, secret, epsilon)

    def commit(self, connection: Connection, cohort: int, now: float) -> None:
        """Charges the prepared round, in the transaction that opens it."""
        opening, plan = self.opening, self.plan
        last = last_charge(connection)
        seq, prev = (1, FIRST_PREV) if last is None else (last[0] + 1, last[1])
        row = ChargeRow(
            seq=seq,
            run=self._run,
            round=opening.round_number,
            mode=plan.mode,
            noise_multiplier=self._mechanism.noise_multiplier,
            clipping_norm=plan.clipping_norm,
            sampling_rate=self._mechanism.sampling_rate,
            population=opening.population,
            cohort=cohort,
            epsilon=opening.epsilon,
            delta=plan.delta,
            secret_sha256=_sha256(opening.secret),
            at=now,
            prev=prev,
            hash="",
            key_id="",
            signature="",
        )
        row = signed(row, self._private.keys().signer)
        insert_charge(connection, row)
        anchor_charge(connection, row, now)
        insert_secret(connection, self._run, opening.round_number, opening.secret)

    def charged(self, round_number: int) -> Charged:
        """The charge and the secret of the round under way, as they were committed.

        Raises:
            RoundError: (disk or an intruder) the round was not charged, or its secret is not the one that was.
        """
        with self._database.read() as connection:
            charge = load_charge(connection, self._run, round_number)
            secret = load_secret(connection, self._run, round_number)
        if charge is None or secret is None or _sha256(secret) != charge.secret_sha256:
            raise RoundError(f"round {round_number} was not charged: no noise is drawn for it")
        return Charged(charge, secret)

    def end(self, connection: Connection, round_number: int) -> None:
        """Destroys the round's secret, in the transaction that ends the round, however it ends."""
        delete_secret(connection, self._run, round_number)

    def _epsilon(self, connection: Connection, further: Mechanism | None = None) -> float:
        spent = [(mechanism_of(*row[:3]), row[3]) for row in count_mechanisms(connection)]
        return epsilon_of(spent if further is None else _with(spent, further), self.plan.delta)


def mechanism_of(noise_multiplier: float, sampling_rate: float, mode: str) -> Mechanism:
    """What a charge is composed as."""
    return Mechanism(noise_multiplier, sampling_rate, is_coarse=mode != CENTRAL)


def mechanism_for(plan: PrivacyPlan, size: int) -> Mechanism:
    """What a round of a plan costs. Who is asked is no secret from an aggregator: distributed, sampling hides nobody.

    Args:
        size: P.
    """
    if plan.mode == CENTRAL:
        return mechanism_of(plan.noise_multiplier, plan.sampling_rate, CENTRAL)
    return mechanism_of(accounted_multiplier(plan.noise_multiplier, size), 1.0, DISTRIBUTED)


def _with(spent: list[tuple[Mechanism, int]], further: Mechanism) -> list[tuple[Mechanism, int]]:
    counts = dict(spent)
    counts[further] = counts.get(further, 0) + 1
    return list(counts.items())


def _sha256(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
