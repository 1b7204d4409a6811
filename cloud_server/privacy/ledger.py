"""The ledger's chain and signatures: what was charged cannot be changed, dropped or forged without the key.

Laws of the file: pure but for the rows that it reads; every charge is bound to the one before it and signed on its own;
verification names the first charge that is wrong. Source: docs/architecture.md (Differential privacy).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cloud_server.db.engine import Connection
from cloud_server.db.privacy import ChargeRow, load_charges, load_private_rounds
from wire.errors import ConfigurationError, EnvelopeError, StorageError, TrustError
from wire.primitives import SigningKey, VerifyKey, read_private, write_private

FIRST_PREV = "0" * 64
KEY_FILE = "online/privacy-ledger.key"
_CONTEXT = b"shoal privacy ledger\0"
_UNHASHED = frozenset({"hash", "key_id", "signature"})


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


def verify_charges(charges: Sequence[ChargeRow], key: VerifyKey) -> None:
    """Walks the whole chain.

    Raises:
        TrustError: (disk or an intruder) names the first charge that is missing, changed or not signed (`seq`).
    """
    prev = FIRST_PREV
    for seq, row in enumerate(charges, start=1):
        if row.seq != seq:
            raise _wrong(seq, "is missing")
        if row.prev != prev or row.hash != charge_hash(row):
            raise _wrong(seq, "was changed")
        try:
            key.verify(bytes.fromhex(row.signature), _CONTEXT + bytes.fromhex(row.hash))
        except (EnvelopeError, ValueError) as error:
            raise _wrong(seq, "is not signed by the ledger's key") from error
        prev = row.hash


def verify_ledger(connection: Connection, key: VerifyKey) -> list[ChargeRow]:
    """Reads and verifies the ledger, and that every private round of the books has its charge.

    Returns:
        The charges, oldest first.

    Raises:
        TrustError: (disk or an intruder) a charge is wrong, or the newest ones were cut off.
    """
    charges = load_charges(connection)
    verify_charges(charges, key)
    charged = {(row.run, row.round) for row in charges}
    for run, number, _mode in load_private_rounds(connection):
        if (run, number) not in charged:
            raise TrustError(
                f"the charge of round {number} of run {run} is missing from the privacy ledger",
                hint="restore the database from its backup",
                run=run,
                round_number=number,
            )
    return charges


def open_ledger_key(keys: Path, *, is_new: bool) -> SigningKey:
    """The key that signs the ledger, made with the first private run.

    Args:
        keys: the folder of private keys.
        is_new: whether the ledger is empty, so that a missing key may be made.

    Raises:
        StorageError: (operator, disk) it is missing or cannot be read.
        ConfigurationError: (operator) its file is open to others, or is not a key.
    """
    path = keys / KEY_FILE
    if path.exists():
        return _read_key(path)
    if not is_new:
        raise StorageError(
            f"the key of the privacy ledger {path} is missing",
            hint="restore keys/ from its backup",
            path=str(path),
        )
    key = SigningKey.generate()
    write_private(path, f"ed25519 {key.private_bytes().hex()}\n".encode())
    return key


def _read_key(path: Path) -> SigningKey:
    try:
        algorithm, seed = read_private(path).decode("ascii").split()
        if algorithm == "ed25519":
            return SigningKey.from_bytes(bytes.fromhex(seed))
    except (ValueError, TrustError) as error:
        raise _no_key(path) from error
    raise _no_key(path)


def _no_key(path: Path) -> ConfigurationError:
    return ConfigurationError(f"{path} is not a key file", hint="restore it from its backup", path=str(path))


def _wrong(seq: int, what: str) -> TrustError:
    return TrustError(
        f"charge {seq} of the privacy ledger {what}", hint="restore the database from its backup", seq=seq
    )
