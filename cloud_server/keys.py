"""The aggregator's private keys: which there are, where they lie, and which may be away.

Laws of the file: a private key touches the disk only as a 0600 file of its own; no key is ever overwritten;
what has to be offline (`keys/offline`: the root shares and the targets key) may be missing, and only signing
with it fails.
Source: docs/architecture.md, "Keys".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wire.enrolment import OnlineKey
from wire.errors import ConfigurationError, ShoalError, StorageError
from wire.primitives import (
    KEM_ALGORITHMS,
    KemPrivateKey,
    SigningKey,
    random_bytes,
    read_private,
    write_private,
)

ROOT_SHARES = 3
ROOT_THRESHOLD = 2
ONLINE_ROLES = ("parameters", "keys", "rings", "snapshot", "timestamp")
_SIGNING = (*ONLINE_ROLES, "order")
AUDIT_KEY = "audit"
_SEED_BYTES = 32


@dataclass(frozen=True)
class CloudKeys:
    """Every private key of one deployment.

    Attributes:
        root: shares of TUF's root role (2 of 3 sign); empty where they are kept offline.
        targets: signs graphs; None where it is kept offline.
        parameters, keys, rings, snapshot, timestamp: TUF's online roles.
        order: signs every message downward.
        audit: signs heads of the audit chain.
        kem: what devices seal to, newest first; older ones still open.
    """

    root: tuple[SigningKey, ...]
    targets: SigningKey | None
    parameters: SigningKey
    keys: SigningKey
    rings: SigningKey
    snapshot: SigningKey
    timestamp: SigningKey
    order: SigningKey
    audit: SigningKey
    kem: tuple[KemPrivateKey, ...]

    @classmethod
    def from_seed(cls, seed: bytes, *, kem_algorithm: str = "x25519") -> CloudKeys:
        """All keys drawn from one seed, always the same: simulations only, since the seed is every key."""

        def draw(name: str) -> bytes:
            return hashlib.sha256(b"shoal cloud key\0" + name.encode() + b"\0" + seed).digest()

        return _draw_all(draw, kem_algorithm)

    @classmethod
    def load(cls, folder: Path) -> CloudKeys:
        """Reads what `init_keys` wrote; the offline keys as far as they are there.

        Raises:
            StorageError: (operator, disk) an online key is missing or cannot be read.
            ConfigurationError: (operator) a key file is open to others, or is not a key.
        """
        offline, online = folder / "offline", folder / "online"
        shares = (_read_signing(offline / f"root-{share}.key") for share in range(1, ROOT_SHARES + 1))
        return cls(
            root=tuple(key for key in shares if key is not None),
            targets=_read_signing(offline / "targets.key"),
            audit=_read_signing(online / f"{AUDIT_KEY}.key") or _replace_lost_audit_key(online),
            kem=tuple(_read_kem(path) for path in _kem_files(online)),
            **{name: _read_required(online / f"{name}.key") for name in _SIGNING},
        )

    def online_keys(self) -> tuple[tuple[OnlineKey, ...], tuple[OnlineKey, ...]]:
        """The public halves that devices need: (KEM keys, order keys)."""
        kem = tuple(
            OnlineKey(id=key.key_id.hex(), algorithm=key.algorithm, public=key.public_key.public_bytes.hex())
            for key in self.kem
        )
        return kem, (OnlineKey(id=self.order.key_id.hex(), public=self.order.public_bytes.hex()),)

    def online_json(self, *, tenant: str, fleet: str) -> bytes:
        """The TUF target `keys/online.json`."""
        kem, orders = self.online_keys()
        plain = {
            "fleet": fleet,
            "kem": [{"algorithm": key.algorithm, "id": key.id, "public": key.public} for key in kem],
            "orders": [{"id": key.id, "public": key.public} for key in orders],
            "tenant": tenant,
        }
        return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def init_keys(folder: Path, *, kem_algorithm: str = "x25519") -> CloudKeys:
    """Makes every key of a new deployment in `folder` (0700), one 0600 file each.

    Raises:
        ConfigurationError: (operator) there are keys already, or no such algorithm.
        StorageError: (disk) nothing can be written there.
    """
    if kem_algorithm not in KEM_ALGORITHMS:
        raise ConfigurationError(
            f"no KEM algorithm {kem_algorithm!r}", hint=f"use one of {', '.join(KEM_ALGORITHMS)}"
        )
    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(f"there are keys in {folder} already", hint="keys are never overwritten")
    keys = _draw_all(lambda _name: random_bytes(_SEED_BYTES), kem_algorithm)
    offline, online = folder / "offline", folder / "online"
    try:
        for place in (folder, offline, online):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"the key folder {folder} cannot be made: {error.strerror}") from error
    for share, key in enumerate(keys.root, start=1):
        _write_signing(offline / f"root-{share}.key", key)
    if keys.targets is not None:
        _write_signing(offline / "targets.key", keys.targets)
    for name in (*_SIGNING, AUDIT_KEY):
        _write_signing(online / f"{name}.key", getattr(keys, name))
    kem = keys.kem[0]
    write_private(online / "kem-1.key", f"{kem.algorithm} {kem.private_bytes().hex()}\n".encode())
    return keys


def _draw_all(draw: Callable[[str], bytes], kem_algorithm: str) -> CloudKeys:
    return CloudKeys(
        root=tuple(SigningKey.from_bytes(draw(f"root-{share}")) for share in range(1, ROOT_SHARES + 1)),
        targets=SigningKey.from_bytes(draw("targets")),
        kem=(KemPrivateKey.from_bytes(kem_algorithm, draw("kem-1")),),
        **{name: SigningKey.from_bytes(draw(name)) for name in (*_SIGNING, AUDIT_KEY)},
    )


def _replace_lost_audit_key(online: Path) -> SigningKey:
    """A new audit key where there is none: what the one before signed stays verifiable, since its public half stays
    listed, and a chain that nobody signs would be worse than one with a new key."""
    if not online.is_dir():
        raise StorageError(f"there are no keys in {online}", hint="restore keys/ from its backup")
    key = SigningKey.generate()
    _write_signing(online / f"{AUDIT_KEY}.key", key)
    return key


def _kem_files(online: Path) -> list[Path]:
    """`kem-N.key`, the highest number (the newest key) first."""
    found = [path for path in online.glob("kem-*.key") if path.stem.removeprefix("kem-").isdigit()]
    if not found:
        raise StorageError(f"there is no KEM key in {online}", hint="restore keys/ from its backup")
    return sorted(found, key=lambda path: -int(path.stem.removeprefix("kem-")))


def _write_signing(path: Path, key: SigningKey) -> None:
    write_private(path, f"ed25519 {key.private_bytes().hex()}\n".encode())


def _read_required(path: Path) -> SigningKey:
    key = _read_signing(path)
    if key is None:
        raise StorageError(f"the key {path} is missing", hint="restore keys/ from its backup", path=str(path))
    return key


def _read_signing(path: Path) -> SigningKey | None:
    if not path.exists():
        return None
    algorithm, seed = _read_words(path)
    if algorithm != "ed25519":
        raise ConfigurationError(f"{path} does not hold an Ed25519 key", path=str(path))
    return SigningKey.from_bytes(seed)


def _read_kem(path: Path) -> KemPrivateKey:
    return KemPrivateKey.from_bytes(*_read_words(path))


def _read_words(path: Path) -> tuple[str, bytes]:
    try:
        algorithm, seed = read_private(path).decode("ascii").split()
        raw = bytes.fromhex(seed)
    except ValueError as error:
        raise _damaged(path) from error
    if len(raw) != _SEED_BYTES:
        raise _damaged(path)
    return algorithm, raw


def _damaged(path: Path) -> ShoalError:
    return ConfigurationError(f"{path} is not a key file", hint="restore it from its backup", path=str(path))
