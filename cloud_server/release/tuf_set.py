"""The newest signed metadata of a repository, as payloads that may be changed before they are published.

Law of the file: it reads and judges, it signs nothing. Source: TUF specification 1.0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from securesystemslib.signer import Key
from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from cloud_server.release.tuf_signing import DELEGATED, listed_keys
from wire.errors import ReleaseError


@dataclass
class SignedSet:
    """One consistent set.

    Attributes:
        targets: top-level `targets` and the delegated roles, by name.
        files: the signed files as they were read, by role.
    """

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: dict[str, Targets]
    files: dict[str, Metadata[Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, read: Callable[[str], bytes], newest_root: bytes) -> SignedSet:
        """Reads what `timestamp.json` leads to.

        Args:
            read: the bytes under a path such as `metadata/1.snapshot.json`; raises where there are none.

        Raises:
            ReleaseError: (disk) the set is damaged.
        """
        try:
            timestamp = Metadata[Timestamp].from_bytes(read("metadata/timestamp.json"))
            root = Metadata[Root].from_bytes(newest_root)
            version = timestamp.signed.snapshot_meta.version
            snapshot = Metadata[Snapshot].from_bytes(read(f"metadata/{version}.snapshot.json"))
            targets = {
                name: Metadata[Targets].from_bytes(
                    read(f"metadata/{snapshot.signed.meta[f'{name}.json'].version}.{name}.json")
                )
                for name in ("targets", *DELEGATED)
            }
        except (RepositoryError, KeyError) as error:
            raise ReleaseError("the TUF repository is damaged", hint="restore artefacts/tuf") from error
        files: dict[str, Metadata[Any]] = {"timestamp": timestamp, "snapshot": snapshot, **targets}
        payloads = {name: each.signed for name, each in targets.items()}
        return cls(root.signed, timestamp.signed, snapshot.signed, payloads, files)

    def keys_of(self, role: str) -> list[Key]:
        """The keys that count for a role now."""
        return listed_keys(self.targets["targets"] if role in DELEGATED else self.root, role)

    def unproven(self) -> set[str]:
        """The roles whose newest file is not signed by a key that counts: a rotation stopped half-way."""
        found = set()
        for role, file in self.files.items():
            judge = self.targets["targets"] if role in DELEGATED else self.root
            try:
                judge.verify_delegate(role, file.signed_bytes, file.signatures)
            except UnsignedMetadataError:
                found.add(role)
        return found

    def change_key(self, role: str, key: Key, replaced: str) -> None:
        """Lists another key for a role in its lister (root, or top-level targets); both have to be published.

        Args:
            replaced: TUF's id of the key that counts no more.
        """
        lister = self.targets["targets"] if role in DELEGATED else self.root
        lister.revoke_key(replaced, role)
        lister.add_key(key, role)
