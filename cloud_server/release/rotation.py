"""How a key is replaced: the new one is written, listed in what devices trust, and only then used.

Laws of the file: a key's file is on the disk before anything names it; a rotation that stops anywhere leaves a
repository that verifies, or that `TufRepository.refresh` makes verify; what is replaced stays in the folder, where it
counts for nothing. Source: docs/architecture.md, "Keys".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from securesystemslib.signer import Key

from cloud_server.keys import (
    OFFLINE_KEYS,
    ONLINE_ROLES,
    OVERLAP_SECONDS,
    CloudKeys,
    KeyFolder,
    add_generation,
    note_signer,
    retire,
)
from cloud_server.release.tuf_repository import TufRepository
from cloud_server.release.tuf_signing import public_key, read_public_key
from process.clock import Clock
from wire.errors import ConfigurationError, StorageError
from wire.primitives import KEM_ALGORITHMS, KemPrivateKey, SigningKey

ROTATED: Final = ("root", "targets", *ONLINE_ROLES, "order", "kem")


@dataclass(frozen=True, slots=True)
class Rotated:
    """What a rotation led to.

    Attributes:
        key_id: hex; of roles as TUF names it.
        place: the file, or the URI.
        what_follows: for the operator.
    """

    key_id: str
    place: str
    what_follows: str


class Rotation:
    """Rotates the keys of one deployment. The running service follows by itself (`key_watch.py`)."""

    def __init__(self, folder: KeyFolder, repository: TufRepository, clock: Clock) -> None:
        self._folder = folder
        self._repository = repository
        self._clock = clock

    def table(self) -> list[dict[str, Any]]:
        """Every key: role, id, place (`here`, `away` or its URI) and state (`counts`, `until …`, `replaced`)."""
        keys = self._folder()
        here = {public_key(key).keyid for key in keys.role_keys()}
        listed = self._repository.listed_keys()
        rows = [
            {
                "role": role,
                "key_id": name,
                "place": "here" if name in here else keys.signers.get(name, "away"),
                "state": "counts",
            }
            for role, names in listed.items()
            for name in names
        ]
        counting = {name for names in listed.values() for name in names}
        replaced = sorted(here - counting)
        rows += [{"role": "-", "key_id": name, "place": "here", "state": "replaced"} for name in replaced]
        return rows + list(_timed_rows(keys))

    def rotate_role(
        self, role: str, *, share: int = 0, replaced: str = "", signer: str = "", public: bytes = b""
    ) -> Rotated:
        """Gives a role of TUF another key.

        Args:
            share: which share of root; its file says which key that was, unless `replaced` does.
            replaced: beginning of the id of the key that is replaced.
            signer: URI of the new key, where it is no file; `public` is then its public half.

        Raises:
            ConfigurationError: (operator) arguments that do not go together, or the keys that have to sign are away.
        """
        name = f"root-{share}" if role == "root" else role
        if (role == "root") != bool(share):
            raise ConfigurationError(
                "--share goes with root, and root with --share", hint="--share 1, 2 or 3"
            )
        if bool(signer) != bool(public):
            raise ConfigurationError("--signer and --public-key go together")
        if role == "root" and not replaced:
            replaced = self._share_id(name)
        if signer:
            key: Key = read_public_key(public)
            note_signer(self._folder.folder, key.keyid, signer)
            place = signer
        else:
            made = SigningKey.generate()
            key = public_key(made)
            place = str(add_generation(self._home(name), name, made, since=self._clock.now()))
        try:
            self._repository.rotate(role, key, replaced=replaced)
        except BaseException:
            self._take_back(key.keyid, place, is_file=not signer)
            raise
        offline = "put the offline keys back into their safe" if name in OFFLINE_KEYS else "devices follow"
        return Rotated(key.keyid, place, offline)

    def rotate_online(
        self, name: str, *, tenant: str, fleet: str, is_stolen: bool = False, algorithm: str = ""
    ) -> Rotated:
        """Gives the aggregator another key for orders or updates (`order`, `kem`), and lists it.

        Args:
            is_stolen: the one before counts no more from now on, without an overlap.
            algorithm: of the new KEM key; that of the one before if empty.
        """
        folder = self._folder.folder
        # A stolen key for orders is replaced at once, though devices that were away must look for the new one first.
        since = 0.0 if is_stolen and name == "order" else self._clock.now()
        made: SigningKey | KemPrivateKey
        if name == "kem":
            made = KemPrivateKey.generate(algorithm or self._kem_algorithm())
        else:
            made = SigningKey.generate()
        place = add_generation(folder, name, made, since=since)
        if is_stolen:
            retire(folder, name)
        keys = self._folder()
        self._repository.set_online_keys(keys.online_json(tenant=tenant, fleet=fleet))
        days = OVERLAP_SECONDS / 86_400.0
        follows = "the one before counts no more" if is_stolen else f"the one before counts for {days:g} days"
        return Rotated(made.key_id.hex(), str(place), follows)

    def _kem_algorithm(self) -> str:
        """That of the key before, or the usual one where it was lost."""
        try:
            return self._folder().kem[0].algorithm
        except StorageError:
            return KEM_ALGORITHMS[0]

    def _home(self, name: str) -> Path:
        return self._folder.offline if name in OFFLINE_KEYS else self._folder.folder

    def _share_id(self, name: str) -> str:
        """TUF's id of a share whose file is here.

        Raises:
            ConfigurationError: (operator) it is not here.
        """
        listed = self._repository.listed_keys()["root"]
        for key in self._folder.offline_keys(name):
            if (key_id := public_key(key).keyid) in listed:
                return key_id
        raise ConfigurationError(
            f"the share {name} is not here",
            hint="name the lost share's id with --replaces: `shoal-cloud keys show` lists them",
        )

    def _take_back(self, key_id: str, place: str, *, is_file: bool) -> None:
        """Removes a new key's file again, unless what devices trust names the key already."""
        if is_file and not any(key_id in names for names in self._repository.listed_keys().values()):
            Path(place).unlink(missing_ok=True)


def _timed_rows(keys: CloudKeys) -> Iterable[dict[str, Any]]:
    for number, kem in enumerate(keys.kem):
        state = "counts" if number == 0 else "still opens"
        yield {"role": "kem", "key_id": kem.key_id.hex(), "place": "here", "state": state}
    yield {"role": "order", "key_id": keys.order.key_id.hex(), "place": "here", "state": "counts"}
    for order in keys.other_orders:
        yield {"role": "order", "key_id": order.key_id.hex(), "place": "here", "state": "listed"}
