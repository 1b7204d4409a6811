"""What a private run has charged, against what it has drawn: books of their own.

Laws of the file: as of `ledger.py`; a round is charged in the commit that opens it, before anything of it leaves or is
drawn; what is charged stays charged, as it was written; the secret that was charged is the only one that a round's
noise comes from, and is gone once the round has ended. Source: docs/architecture.md, "Differential privacy".
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

_OPEN = "SELECT number, state FROM rounds WHERE number > ? OR state NOT IN ('done', 'failed') ORDER BY number"
_CHARGES = "SELECT seq, round, epsilon, secret_sha256, hash, population FROM privacy_ledger WHERE seq > ? ORDER BY seq"


@dataclass(frozen=True, slots=True)
class Charge:
    """One row of the product's ledger."""

    round_number: int
    epsilon: float
    secret_sha256: str
    row_sha256: str
    population: int


class PrivacyLedger:
    """The books about noise of one history.

    Args:
        violated: told of what must never be; raises.
    """

    def __init__(self, violated: Callable[[str, str], NoReturn]) -> None:
        self._violated = violated
        self._drawn: dict[str, bytes] = {}
        self._charged: dict[int, Charge] = {}
        self._rounds: dict[int, str] = {}
        self._populations: dict[int, int] = {}
        self._last_round = 0

    def drew(self, secret: bytes) -> None:
        """A secret was drawn; whether it counts is for the charge to say."""
        self._drawn[hashlib.sha256(secret).hexdigest()] = secret

    def secret_of(self, round_number: int) -> bytes | None:
        """The secret that a round was charged with; None where it was not charged."""
        return self._drawn.get(self._rounds.get(round_number, ""))

    def population_of(self, round_number: int) -> int:
        """How many devices the cohort of a round was drawn from."""
        return self._populations.get(round_number, 0)

    def read(self, reader: sqlite3.Connection, *, is_whole: bool = False) -> None:
        """Compares rounds, charges and secrets as they are committed.

        Args:
            is_whole: reads every charge again, as after a start.
        """
        self._read_charges(reader, 0 if is_whole else len(self._charged), is_whole)
        for number, state in reader.execute(_OPEN, (self._last_round,)).fetchall():
            self._last_round = max(self._last_round, number)
            if number not in self._rounds:
                self._violated("cloud", f"round {number} is {state}, and was not charged for its noise")
        self._check_secrets(reader)

    def _read_charges(self, reader: sqlite3.Connection, after: int, is_whole: bool) -> None:
        rows = reader.execute(_CHARGES, (after,)).fetchall()
        seen = set()
        for seq, *values in rows:
            seen.add(seq)
            known = self._charged.get(seq)
            charge = Charge(*values)
            if known is None:
                self._note(seq, charge)
            elif known != charge:
                self._violated("cloud", f"charge {seq} is another than it was")
        if is_whole and len(seen) < len(self._charged):
            self._violated("cloud", f"{len(self._charged) - len(seen)} charges are gone")

    def _note(self, seq: int, charge: Charge) -> None:
        number, secret = charge.round_number, charge.secret_sha256
        last = self._charged.get(seq - 1)
        if seq != len(self._charged) + 1 or number in self._rounds:
            self._violated("cloud", f"charge {seq} is of round {number}, which was charged before")
        if last is not None and charge.epsilon < last.epsilon:
            self._violated("cloud", f"charge {seq} makes the privacy that was spent less")
        if secret not in self._drawn:
            self._violated("cloud", f"charge {seq} names a secret that nobody drew")
        self._charged[seq] = charge
        self._rounds[number] = secret
        self._populations[number] = charge.population

    def _check_secrets(self, reader: sqlite3.Connection) -> None:
        rows = reader.execute(
            "SELECT s.round, s.secret, r.state FROM privacy_secrets s LEFT JOIN rounds r ON r.number = s.round"
        ).fetchall()
        for number, secret, state in rows:
            if hashlib.sha256(secret).hexdigest() != self._rounds.get(number):
                self._violated("cloud", f"round {number} has another secret than it was charged with")
            if state in (None, "evaluating", "deciding", "done", "failed"):
                self._violated("cloud", f"the secret of round {number} outlives its use of noise")
