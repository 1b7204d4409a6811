"""The ledger's chain, signatures and anchors: what was charged cannot be changed, dropped or forged unseen.

Laws of the file: pure but for the rows that it reads; every charge is bound to the one before it and signed on its own,
and stands in the audit chain, whose heads are signed, told to a witness and kept in release metadata, so that charges
that are cut off the end are missed there; a key that has a successor in the ledger signs nothing more; verification
names the first charge that is wrong. Source: docs/architecture.md (Differential privacy).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from cloud_server.db.audit import AuditEntry, append_audit, load_audit
from cloud_server.db.engine import Connection
from cloud_server.db.privacy import ChargeRow, load_charges, load_private_rounds
from wire.errors import EnvelopeError, TrustError
from wire.primitives import SigningKey, VerifyKey

FIRST_PREV: Final = "0" * 64
CHARGED: Final = "privacy.charged"
"""Kind of the audit entry of a charge."""
_CONTEXT = b"shoal privacy ledger\0"
_UNHASHED = frozenset({"hash", "key_id", "signature"})
_ANCHORED = ("seq", "hash", "run", "round", "mode", "noise_multiplier", "sampling_rate", "epsilon", "delta")
_HINT = "restore the database from its backup"


@dataclass(frozen=True, slots=True)
class LedgerFault:
    """What is wrong with a charge. `entry`: the audit entry that says so; 0 where the ledger alone does."""

    seq: int
    entry: int
    what: str


def signed(row: ChargeRow, key: SigningKey) -> ChargeRow:
    """The charge with its hash and signature."""
    digest = charge_hash(row)
    signature = key.sign(_CONTEXT + bytes.fromhex(digest)).hex()
    return replace(row, hash=digest, key_id=key.key_id.hex(), signature=signature)


def charge_hash(row: ChargeRow) -> str:
    """SHA-256 (hex) of everything in a charge but hash, key and signature."""
    plain = {name: getattr(row, name) for name in ChargeRow.__slots__ if name not in _UNHASHED}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def anchor_charge(connection: Connection, row: ChargeRow, now: float) -> None:
    """Puts a charge into the audit chain, in the transaction that appends it to the ledger."""
    append_audit(connection, CHARGED, now, {name: getattr(row, name) for name in _ANCHORED})


def anchor_of(seq: int, hash: str) -> dict[str, str]:
    """The newest charge, as release metadata carries it."""
    return {"privacy": json.dumps({"charges": seq, "hash": hash}, sort_keys=True)}


def anchored_charges(custom: Mapping[str, Any]) -> int:
    """How many charges there were when metadata was signed; 0 where it does not say."""
    return int(json.loads(custom["privacy"])["charges"]) if "privacy" in custom else 0


def verify_charges(charges: Sequence[ChargeRow], keys: Sequence[VerifyKey]) -> None:
    """Walks the whole chain.

    Args:
        keys: every generation that may have signed, oldest first.

    Raises:
        TrustError: (disk or an intruder) names the first charge that is missing, changed or not signed (`seq`).
    """
    prev, oldest = FIRST_PREV, 0
    generations = {key.key_id.hex(): number for number, key in enumerate(keys)}
    for seq, row in enumerate(charges, start=1):
        if row.seq != seq:
            raise _wrong(seq, "is missing")
        if row.prev != prev or row.hash != charge_hash(row):
            raise _wrong(seq, "was changed")
        generation = generations.get(row.key_id, -1)
        if 0 <= generation < oldest:
            raise _wrong(seq, "is signed by a key that had been replaced")
        try:
            if generation < 0:
                raise EnvelopeError("message does not open", reason="signature")
            keys[generation].verify(bytes.fromhex(row.signature), _CONTEXT + bytes.fromhex(row.hash))
        except (EnvelopeError, ValueError) as error:
            raise _wrong(seq, "is not signed by the ledger's key") from error
        prev, oldest = row.hash, generation


def find_faults(
    charges: Sequence[ChargeRow], keys: Sequence[VerifyKey], entries: Iterable[AuditEntry]
) -> list[LedgerFault]:
    """What is wrong with the ledger, by itself and beside the audit chain; empty where nothing is.

    Args:
        entries: of the kind `CHARGED`, in their order.
    """
    faults = []
    try:
        verify_charges(charges, keys)
    except TrustError as error:
        faults.append(LedgerFault(int(error.facts["seq"]), 0, str(error)))
    hashes = {row.seq: row.hash for row in charges}
    first, told = 0, set()
    for entry in entries:
        seq, wanted = int(entry.facts["seq"]), str(entry.facts["hash"])
        first = first or seq
        told.add(seq)
        if hashes.get(seq) != wanted:
            what = "is missing" if seq not in hashes else "is another one"
            said = f"charge {seq} of the privacy ledger {what} (audit entry {entry.seq})"
            faults.append(LedgerFault(seq, entry.seq, said))
    # Charges from before they were told to the audit chain stand at the beginning only.
    faults += [
        LedgerFault(seq, 0, f"charge {seq} of the privacy ledger is not in the audit chain")
        for seq in hashes
        if first and seq > first and seq not in told
    ]
    return sorted(faults, key=lambda fault: fault.seq)


def verify_ledger(connection: Connection, keys: Sequence[VerifyKey]) -> list[ChargeRow]:
    """Reads and verifies the ledger, that the audit chain has the same, and that every private round has its charge.

    Returns:
        The charges, oldest first.

    Raises:
        TrustError: (disk or an intruder) a charge is wrong, or the newest ones were cut off.
    """
    charges = load_charges(connection)
    faults = find_faults(charges, keys, load_audit(connection, kind=CHARGED))
    if faults:
        raise TrustError(faults[0].what, hint=_HINT, seq=faults[0].seq, entry=faults[0].entry)
    charged = {(row.run, row.round) for row in charges}
    for run, number, _mode in load_private_rounds(connection):
        if (run, number) not in charged:
            raise TrustError(
                f"the charge of round {number} of run {run} is missing from the privacy ledger",
                hint=_HINT,
                run=run,
                round_number=number,
            )
    return charges


def _wrong(seq: int, what: str) -> TrustError:
    return TrustError(f"charge {seq} of the privacy ledger {what}", hint=_HINT, seq=seq)
