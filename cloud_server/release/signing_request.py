"""A role's metadata on its way to a machine that no network reaches, and back with signatures.

Laws of the file: it needs nothing but the base install; what is signed is what the file shows, and nothing is signed
by a key that the role does not list; signatures are added, never replaced, so that shares on several machines sign one
after the other. The file proves nothing: whoever publishes it verifies it as devices do (`TufRepository`). Sources: TUF
specification 1.0.33, docs/how-to/keys.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Targets
from tuf.api.serialization.json import JSONSerializer

from cloud_server.release.tuf_signing import FileSigner, public_key
from wire.errors import ConfigurationError, ReleaseError, StorageError
from wire.primitives import SigningKey

FORMAT: Final = "shoal-signing-request 1"
MAX_BYTES: Final = 16 * 2**20
OFFLINE_ROLES: Final = ("root", "targets")
_GRAPHS: Final = "graphs/"


@dataclass(frozen=True)
class SigningRequest:
    """What is to be signed.

    Attributes:
        role: `root` or `targets`.
        fleet: tenant and fleet, for the person who signs.
        key_ids: TUF's ids (hex) of the keys whose signatures count, and `threshold` of them are needed.
        metadata: the role's next file, with the signatures so far.
        before: the file that counts now.
    """

    role: str
    fleet: str
    key_ids: tuple[str, ...]
    threshold: int
    metadata: Metadata[Any]
    before: Metadata[Any]

    @classmethod
    def from_bytes(cls, data: bytes) -> SigningRequest:
        """Reads a file.

        Raises:
            ReleaseError: (whoever carried it) it is none of ours, or damaged.
        """
        if len(data) > MAX_BYTES:
            raise ReleaseError("the signing request is too long", size_bytes=len(data), limit_bytes=MAX_BYTES)
        try:
            plain = json.loads(data)
            if plain["format"] != FORMAT or plain["role"] not in OFFLINE_ROLES:
                raise _damaged("it has another format")
            metadata = Metadata[Any].from_dict(plain["metadata"])
            before = Metadata[Any].from_dict(plain["before"])
            found = cls(
                role=plain["role"],
                fleet=str(plain["fleet"])[:200],
                key_ids=tuple(str(each) for each in plain["key_ids"]),
                threshold=int(plain["threshold"]),
                metadata=metadata,
                before=before,
            )
        except (ValueError, KeyError, TypeError, AttributeError, RepositoryError, RecursionError) as error:
            raise _damaged(str(error)) from error
        kind = Root if found.role == "root" else Targets
        if not isinstance(metadata.signed, kind) or not isinstance(before.signed, kind):
            raise _damaged("it is for another role than it says")
        return found

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads: JSON that a person can read, too."""
        plain = {
            "format": FORMAT,
            "role": self.role,
            "fleet": self.fleet,
            "key_ids": list(self.key_ids),
            "threshold": self.threshold,
            "metadata": self.metadata.to_dict(),
            "before": self.before.to_dict(),
        }
        return json.dumps(plain, indent=1, sort_keys=True).encode() + b"\n"

    def file(self) -> bytes:
        """The role's file as it is published."""
        return self.metadata.to_bytes(JSONSerializer(compact=True))

    def signed_by(self) -> list[str]:
        """The ids of the keys that have signed."""
        return sorted(set(self.metadata.signatures) & set(self.key_ids))

    def changes(self) -> list[str]:
        """What a signature would say that the file before did not, line by line."""
        now, before = self.metadata.signed, self.before.signed
        lines = [
            f"{self.role} of {self.fleet}: version {before.version} -> {now.version}",
            f"ends {before.expires:%Y-%m-%d} -> {now.expires:%Y-%m-%d}",
        ]
        if isinstance(now, Targets) and isinstance(before, Targets):
            old, new = _hashes(before), _hashes(now)
            lines += [f"+ {path} sha256 {new[path]}" for path in sorted(new.keys() - old.keys())]
            lines += [f"- {path}" for path in sorted(old.keys() - new.keys())]
            lines += [
                f"! {path} sha256 {old[path]} -> {new[path]}"
                for path in sorted(old.keys() & new.keys())
                if old[path] != new[path]
            ]
        known = {"version", "expires", "targets"}
        plain_now, plain_before = now.to_dict(), before.to_dict()
        lines += [
            f"! {name} is another"
            for name in sorted(plain_now.keys() | plain_before.keys())
            if name not in known and plain_now.get(name) != plain_before.get(name)
        ]
        return lines

    def signed(self, keys: Sequence[SigningKey]) -> SigningRequest:
        """The request with the signatures of every one of these keys that counts.

        Raises:
            ConfigurationError: (operator) none of them counts for the role.
        """
        mine = [key for key in keys if public_key(key).keyid in self.key_ids]
        if not mine:
            raise ConfigurationError(
                f"no key here counts for {self.role}", hint="name the folder of the offline keys: --keys DIR"
            )
        metadata = Metadata[Any].from_dict(self.metadata.to_dict())
        for key in mine:
            metadata.sign(FileSigner(key), append=True)
        return replace(self, metadata=metadata)

    def check_bundle(self, folder: Path) -> int:
        """Compares every graph that would be listed anew with the files of a bundle; how many that were.

        Raises:
            ReleaseError: (whoever made the request) one of them is not the bundle's, or something else changes.
            StorageError: (disk) a file cannot be read.
        """
        old, new = _hashes(self.before.signed), _hashes(self.metadata.signed)
        if old.items() - new.items():
            raise ReleaseError("the request takes graphs away, or changes them", hint="sign nothing")
        added = sorted(new.keys() - old.keys())
        for path in added:
            name = path.rpartition("/")[2]
            try:
                data = (folder / name).read_bytes()
            except OSError as error:
                raise StorageError(f"{folder / name} cannot be read: {error.strerror}") from error
            if not path.startswith(_GRAPHS) or hashlib.sha256(data).hexdigest() != new[path]:
                raise ReleaseError(f"{path} is not what the bundle has", path=path, hint="sign nothing")
        return len(added)


def _hashes(payload: Any) -> Mapping[str, str]:
    if not isinstance(payload, Targets):
        return {}
    return {path: target.hashes.get("sha256", "") for path, target in payload.targets.items()}


def _damaged(why: str) -> ReleaseError:
    return ReleaseError(f"this is no signing request: {why[:200]}", hint="make it anew, with --request")
