"""The aggregator's private keys: which there are, where they lie, and which may be away.

Laws of the file: a private key touches the disk only as a 0600 file of its own; no key is ever overwritten, the
next generation of `NAME.key` is `NAME-2.key`; what has to be offline (`keys/offline`: the root shares and the
targets key) may be missing, and only signing with it fails; the signed metadata says which generation of a role's
key counts, time says it of the keys for orders and updates.
Source: docs/architecture.md, "Keys".
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from process.clock import Clock
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
AUDIT_KEY = "audit"
OFFLINE_KEYS = (*(f"root-{share}" for share in range(1, ROOT_SHARES + 1)), "targets")
SIGNERS = "signers.json"
OVERLAP_SECONDS = 7 * 86_400.0
"""How long a key for orders or updates still counts after its successor came: longer than devices are away."""
LEARN_SECONDS = 86_400.0
"""How long devices have to hear of a new key for orders before it signs; they look every six hours."""
_SIGNING = (*ONLINE_ROLES, "order")
_NAMES = (*_SIGNING, "kem", *OFFLINE_KEYS)
_GENERATION = re.compile(rf"({'|'.join(_NAMES)})(?:-([1-9]\d{{0,5}}))?\.key")
_SEED_BYTES = 32
_MAX_SIGNERS_BYTES = 65_536

K = TypeVar("K")


@dataclass(frozen=True)
class CloudKeys:
    """Every private key of one deployment, as of one moment.

    Attributes:
        root: shares of TUF's root role (2 of 3 sign); empty where they are kept offline.
        targets: signs graphs; None where it is kept offline.
        parameters, keys, rings, snapshot, timestamp: TUF's online roles.
        order: signs every message downward now.
        kem: what devices seal to, newest first; older ones still open.
        audit: signs heads of the audit chain.
        other_orders: keys for orders that devices are told of beside `order`: its successor, or its predecessor.
        spare: other generations of TUF's roles; one of them counts when a rotation did not end.
        signers: where a key is that is no file here: TUF's key id to a URI of securesystemslib.
        changes_at: when time alone makes another set of these (unix seconds).
    """

    root: tuple[SigningKey, ...]
    targets: SigningKey | None
    parameters: SigningKey
    keys: SigningKey
    rings: SigningKey
    snapshot: SigningKey
    timestamp: SigningKey
    order: SigningKey
    kem: tuple[KemPrivateKey, ...]
    audit: SigningKey
    other_orders: tuple[SigningKey, ...] = ()
    spare: tuple[SigningKey, ...] = ()
    signers: Mapping[str, str] = field(default_factory=dict)
    changes_at: float = math.inf

    @classmethod
    def from_seed(cls, seed: bytes, *, kem_algorithm: str = "x25519") -> CloudKeys:
        """All keys drawn from one seed, always the same: simulations only, since the seed is every key."""

        def draw(name: str) -> bytes:
            return hashlib.sha256(b"shoal cloud key\0" + name.encode() + b"\0" + seed).digest()

        return _draw_all(draw, kem_algorithm)

    @classmethod
    def load(cls, folder: Path, *, offline: Path | None = None, now: float = 0.0) -> CloudKeys:
        """Reads what `init_keys` and `add_generation` wrote; the offline keys as far as they are there.

        Args:
            offline: where the offline keys are, such as on a stick; `folder/offline` if None.
            now: decides which keys for orders and updates count (unix seconds); 0 counts them all.

        Raises:
            StorageError: (operator, disk) an online key is missing or cannot be read.
            ConfigurationError: (operator) a key file is open to others, or is not a key.
        """
        online = folder / "online"
        found = _generations(online, (*_SIGNING, "kem")) | _generations(
            offline or folder / "offline", OFFLINE_KEYS
        )
        signing = {name: [_read_signing(path) for path in found[name]] for name in (*_SIGNING, *OFFLINE_KEYS)}
        for name in _SIGNING:
            if not signing[name]:
                raise _missing(online / f"{name}.key")
        if not found["kem"]:
            raise StorageError(f"there is no KEM key in {online}", hint="restore keys/ from its backup")
        audit = online / f"{AUDIT_KEY}.key"
        orders = _Timed.of(signing.pop("order"), now)
        kem = _Timed.of([_read_kem(path) for path in found["kem"]], now)
        order = orders.in_effect(now)
        newest = {name: keys[0][0] for name, keys in signing.items() if keys}
        return cls(
            root=tuple(newest[name] for name in OFFLINE_KEYS if name in newest and name != "targets"),
            targets=newest.get("targets"),
            parameters=newest["parameters"],
            keys=newest["keys"],
            rings=newest["rings"],
            snapshot=newest["snapshot"],
            timestamp=newest["timestamp"],
            order=order,
            kem=tuple(kem.counting),
            audit=read_signing_key(audit) if audit.exists() else _replace_lost_audit_key(online),
            other_orders=tuple(key for key in orders.counting if key is not order),
            spare=tuple(key for keys in signing.values() for key, _ in keys[1:]),
            signers=_read_signers(folder / SIGNERS),
            changes_at=min(orders.changes_at, kem.changes_at),
        )

    def role_keys(self) -> tuple[SigningKey, ...]:
        """Every key here that could sign for a role of TUF."""
        online = (self.parameters, self.keys, self.rings, self.snapshot, self.timestamp)
        top = (*self.root, self.targets) if self.targets is not None else self.root
        return (*top, *online, *self.spare)

    def online_keys(self) -> tuple[tuple[OnlineKey, ...], tuple[OnlineKey, ...]]:
        """The public halves that devices need: (KEM keys, order keys)."""
        kem = tuple(
            OnlineKey(id=key.key_id.hex(), algorithm=key.algorithm, public=key.public_key.public_bytes.hex())
            for key in self.kem
        )
        orders = (self.order, *self.other_orders)
        return kem, tuple(OnlineKey(id=key.key_id.hex(), public=key.public_bytes.hex()) for key in orders)

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


class KeyFolder:
    """The keys of a state folder as they are now: a command may rotate one while the service runs.

    Args:
        offline: where the offline keys are, if not in the folder.
    """

    def __init__(self, folder: Path, clock: Clock, *, offline: Path | None = None) -> None:
        self.folder = folder
        self.offline = offline or folder / "offline"
        self._clock = clock
        self._lock = threading.Lock()
        self._present: tuple[tuple[str, int, int], ...] = ()
        self._kept: CloudKeys | None = None

    def __call__(self) -> CloudKeys:
        """The keys; the same object until a file came or went, or time made another set. Raises like `load`."""
        with self._lock:
            present, now = self._look(), self._clock.now()
            if self._kept is None or present != self._present or now >= self._kept.changes_at:
                self._kept = CloudKeys.load(self.folder, offline=self.offline, now=now)
                self._present = present
            return self._kept

    def offline_keys(self, name: str) -> list[SigningKey]:
        """The generations of an offline key (`root-N`, `targets`) that are here, newest first."""
        return [read_signing_key(path) for path in _generations(self.offline, (name,))[name]]

    def _look(self) -> tuple[tuple[str, int, int], ...]:
        files = [self.folder / SIGNERS]
        for place in (self.folder / "online", self.offline):
            files += place.glob("*.key")
        found = []
        for path in files:
            try:
                status = path.stat()
            except OSError:
                continue
            found.append((str(path), status.st_mtime_ns, status.st_size))
        return tuple(sorted(found))


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


def copy_keys(made: Path, folder: Path) -> None:
    """Takes over the keys that `init_keys` made elsewhere.

    Raises:
        StorageError: (operator, disk) they cannot be read, or not be written.
        ConfigurationError: (operator) a file among them is none of a key's, or open to others.
    """
    CloudKeys.load(made)
    for part in ("online", "offline"):
        place = folder / part
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            files = sorted((made / part).glob("*.key"))
        except OSError as error:
            raise StorageError(f"the key folder {folder} cannot be made: {error.strerror}") from error
        for path in files:
            write_private(place / path.name, read_private(path))


def _draw_all(draw: Callable[[str], bytes], kem_algorithm: str) -> CloudKeys:
    def signing(name: str) -> SigningKey:
        return SigningKey.from_bytes(draw(name))

    return CloudKeys(
        root=tuple(signing(name) for name in OFFLINE_KEYS if name != "targets"),
        targets=signing("targets"),
        parameters=signing("parameters"),
        keys=signing("keys"),
        rings=signing("rings"),
        snapshot=signing("snapshot"),
        timestamp=signing("timestamp"),
        order=signing("order"),
        kem=(KemPrivateKey.from_bytes(kem_algorithm, draw("kem-1")),),
        audit=signing(AUDIT_KEY),
    )


def replace_audit_key(folder: Path) -> SigningKey:
    """A new audit key, in place of the one before, which is worth nothing more: no old head is ever signed again."""
    key = SigningKey.generate()
    _write_signing(folder / "online" / f"{AUDIT_KEY}.key", key)
    return key


def _replace_lost_audit_key(online: Path) -> SigningKey:
    """A new audit key where there is none: what the one before signed stays verifiable, since its public half stays
    listed, and a chain that nobody signs would be worse than one with a new key."""
    if not online.is_dir():
        raise StorageError(f"there are no keys in {online}", hint="restore keys/ from its backup")
    return replace_audit_key(online.parent)


@dataclass(frozen=True)
class _Timed(Generic[K]):
    """Generations of a key that devices learn of, newest first, each with the time since it counts."""

    counting: list[K]
    since: list[float]
    changes_at: float

    @classmethod
    def of(cls, generations: list[tuple[K, float]], now: float) -> _Timed[K]:
        """Those that count at a time: the newest, and those whose successor has not been here for the overlap."""
        keys, since = [generations[0][0]], [generations[0][1]]
        moments = [generations[0][1] + LEARN_SECONDS] if generations[0][1] else []
        for (_, successor), (key, begins) in itertools.pairwise(generations):
            if now >= successor + OVERLAP_SECONDS:
                break
            keys.append(key)
            since.append(begins)
            moments.append(successor + OVERLAP_SECONDS)
        return cls(keys, since, min((moment for moment in moments if moment > now), default=math.inf))

    def in_effect(self, now: float) -> K:
        """The newest that devices had time to hear of; one without a date (`since` 0) counts at once."""
        for key, since in zip(self.counting, self.since, strict=True):
            if since == 0 or now >= since + LEARN_SECONDS:
                return key
        return self.counting[-1]


def add_generation(folder: Path, name: str, key: SigningKey | KemPrivateKey, *, since: float) -> Path:
    """Writes the next generation of a key beside the ones before it; returns its file.

    Args:
        folder: the key folder, or `offline` of it on a stick for an offline key.
        name: a role, `order`, `kem`, `targets` or `root-N`.
        since: when it was made (unix seconds); 0 lets a key for orders sign at once.

    Raises:
        StorageError: (disk) it cannot be written.
    """
    place = folder if name in OFFLINE_KEYS else folder / "online"
    there = _generations(place, (name,))[name]
    number = 1 + max((_generation_of(path) for path in there), default=0)
    path = place / (f"{name}.key" if number == 1 and name != "kem" else f"{name}-{number}.key")
    algorithm = key.algorithm if isinstance(key, KemPrivateKey) else "ed25519"
    write_private(path, f"{algorithm} {key.private_bytes().hex()} {since:.0f}\n".encode())
    return path


def retire(folder: Path, name: str) -> list[Path]:
    """Takes every generation but the newest out of use, into `retired/` of the key folder; returns them.

    Raises:
        StorageError: (disk) they cannot be moved.
    """
    older = _generations(folder / "online", (name,))[name][1:]
    place = folder / "retired"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        for path in older:
            path.rename(place / path.name)
    except OSError as error:
        raise StorageError(f"the old keys cannot be moved to {place}: {error.strerror}") from error
    return older


def read_signing_key(path: Path) -> SigningKey:
    """The signing key in a file.

    Raises:
        StorageError: (operator, disk) it is missing or cannot be read.
        ConfigurationError: (operator) it is open to others, or is not such a key.
    """
    return _read_signing(path)[0]


def read_offline_keys(folder: Path) -> list[SigningKey]:
    """Every offline key in a folder, such as a stick: shares of the root, the targets key, and their predecessors.

    Raises:
        StorageError: (operator, disk) there is none, or one cannot be read.
        ConfigurationError: (operator) one is open to others, or is not such a key.
    """
    files = [path for paths in _generations(folder, OFFLINE_KEYS).values() for path in paths]
    if not files:
        raise StorageError(
            f"there are no offline keys in {folder}", hint="root-1.key … and targets.key lie there"
        )
    return [read_signing_key(path) for path in files]


def note_signer(folder: Path, key_id: str, uri: str) -> None:
    """Remembers where a key is that is no file here.

    Args:
        key_id: as TUF's metadata names the key.
        uri: as securesystemslib's `Signer.from_priv_key_uri` takes it; no secret may be in it.

    Raises:
        StorageError: (disk) it cannot be written.
    """
    known = {**_read_signers(folder / SIGNERS), key_id: uri}
    write_private(folder / SIGNERS, json.dumps(known, indent=2, sort_keys=True).encode() + b"\n")


def _read_signers(path: Path) -> Mapping[str, str]:
    if not path.exists():
        return {}
    try:
        known = json.loads(read_private(path)[:_MAX_SIGNERS_BYTES])
    except (ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(known, dict) or not all(isinstance(uri, str) for uri in known.values()):
        raise _damaged(path)
    return known


def _generations(place: Path, names: tuple[str, ...]) -> dict[str, list[Path]]:
    """The files of each key, newest generation first; a longer name never counts as a shorter one's generation."""
    found: dict[str, list[Path]] = {name: [] for name in names}
    for path in place.glob("*.key"):
        match = _GENERATION.fullmatch(path.name)
        if match is not None and match[1] in found:
            found[match[1]].append(path)
    return {name: sorted(paths, key=_generation_of, reverse=True) for name, paths in found.items()}


def _generation_of(path: Path) -> int:
    match = _GENERATION.fullmatch(path.name)
    return int(match[2] or 1) if match is not None else 0


def _write_signing(path: Path, key: SigningKey) -> None:
    write_private(path, f"ed25519 {key.private_bytes().hex()}\n".encode())


def _read_signing(path: Path) -> tuple[SigningKey, float]:
    algorithm, seed, since = _read_words(path)
    if algorithm != "ed25519":
        raise ConfigurationError(f"{path} does not hold an Ed25519 key", path=str(path))
    return SigningKey.from_bytes(seed), since


def _read_kem(path: Path) -> tuple[KemPrivateKey, float]:
    algorithm, seed, since = _read_words(path)
    return KemPrivateKey.from_bytes(algorithm, seed), since


def _read_words(path: Path) -> tuple[str, bytes, float]:
    """Algorithm, seed, and since when the key is there (0: from the first day)."""
    try:
        algorithm, seed, *rest = read_private(path).decode("ascii").split()
        raw = bytes.fromhex(seed)
        since = float(int(rest[0])) if rest else 0.0
    except ValueError as error:
        raise _damaged(path) from error
    if len(raw) != _SEED_BYTES or len(rest) > 1 or not 0 <= since <= 1e11:
        raise _damaged(path)
    return algorithm, raw, since


def _missing(path: Path) -> ShoalError:
    return StorageError(f"the key {path} is missing", hint="restore keys/ from its backup", path=str(path))


def _damaged(path: Path) -> ShoalError:
    return ConfigurationError(f"{path} is not a key file", hint="restore it from its backup", path=str(path))
