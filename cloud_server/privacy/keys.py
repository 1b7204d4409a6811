"""The keys that sign the privacy ledger: one file a generation, the newest signs, older ones stay to verify.

Laws of the file: a key is made only for an empty ledger, or as the successor of one that is there; no file is ever
overwritten (`privacy-ledger.key`, then `privacy-ledger-2.key`, …). Source: docs/architecture.md (Differential privacy).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloud_server.keys import read_signing_key
from wire.errors import StorageError
from wire.primitives import SigningKey, VerifyKey, write_private

KEY_FILE: Final = "online/privacy-ledger.key"
_GENERATION = re.compile(r"privacy-ledger(?:-([1-9]\d{0,5}))?\.key")


@dataclass(frozen=True, slots=True)
class LedgerKeys:
    """Every generation, oldest first; at least one."""

    generations: tuple[SigningKey, ...]

    @property
    def signer(self) -> SigningKey:
        """The one that signs now."""
        return self.generations[-1]

    @property
    def verify_keys(self) -> tuple[VerifyKey, ...]:
        return tuple(key.verify_key for key in self.generations)


def open_ledger_keys(keys: Path, *, is_new: bool) -> LedgerKeys:
    """The keys of the ledger; the first is made with the first private run.

    Args:
        keys: the folder of private keys.
        is_new: whether the ledger is empty, so that a missing key may be made.

    Raises:
        StorageError: (operator, disk) there is none, or one cannot be read.
        ConfigurationError: (operator) a file is open to others, or is not a key.
    """
    found = _files(keys)
    if not found and is_new:
        _write(keys / KEY_FILE, SigningKey.generate())
        found = _files(keys)
    # The first generation is what the oldest charges are verified by.
    if 1 not in found:
        path = keys / KEY_FILE
        raise StorageError(
            f"the key of the privacy ledger {path} is missing",
            hint="restore keys/ from its backup",
            path=str(path),
        )
    return LedgerKeys(tuple(read_signing_key(found[number]) for number in sorted(found)))


def add_ledger_key(keys: Path) -> LedgerKeys:
    """Makes the next generation, which signs from now on.

    Raises:
        StorageError, ConfigurationError: as `open_ledger_keys`; there must be a key already.
    """
    open_ledger_keys(keys, is_new=False)
    number = max(_files(keys)) + 1
    _write(keys / "online" / f"privacy-ledger-{number}.key", SigningKey.generate())
    return open_ledger_keys(keys, is_new=False)


def _files(keys: Path) -> dict[int, Path]:
    matches = [(_GENERATION.fullmatch(path.name), path) for path in (keys / "online").glob("*.key")]
    return {int(match[1] or 1): path for match, path in matches if match is not None}


def _write(path: Path, key: SigningKey) -> None:
    write_private(path, f"ed25519 {key.private_bytes().hex()}\n".encode())
