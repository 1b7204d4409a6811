"""The repository that devices trust: what The Update Framework's metadata lists, and how it is published.

Laws of the file: a version never goes back and a published file never changes; one publication is written
targets first, timestamp last, so that a device sees all of it or none of it, whatever instruction the writer
dies at; the automatic part holds no key that could sign a new graph. Sources: TUF specification 1.0.33,
docs/architecture.md, "TUF layout".

What is published lies in the store under `tuf/`, which is also the only state: every call reads the newest
signed set, changes it, and publishes the next one under the repository's lock (processes share it by a file
lock).
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar

from securesystemslib.signer import Key
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, TargetFile, Targets, Timestamp

from cloud_server.artefacts import Artefacts, is_key
from cloud_server.keys import CloudKeys
from cloud_server.release.signing_request import SigningRequest
from cloud_server.release.tuf_set import SignedSet
from cloud_server.release.tuf_signing import DELEGATED, SIGNED_AT, TOP_LEVEL, RoleSigning, TufExpiry
from process.clock import Clock
from wire.errors import ConfigurationError, ReleaseError
from wire.helper import HELPER_JSON
from wire.manifest import RELEASE, Release

ONLINE_JSON: Final = "keys/online.json"
AUDIT_JSON: Final = "keys/audit.json"
AUTHORITIES_PEM: Final = "keys/authorities.pem"
ROLES: Final = ("root", *TOP_LEVEL, *DELEGATED)
_PREFIX: Final = "tuf/"

_Versioned = TypeVar("_Versioned", Targets, Snapshot)


class TufRepository:
    """The repository of one deployment.

    Args:
        store: where it lies (folder, S3, or memory in a simulation).
        keys: what it signs with, or a function that gives the keys of now; without the offline keys only `init`,
            `add_graphs` and what changes root or targets fail.
        clock: expiries count from its wall clock.
        lock: makes one writer of many; over a shared folder it must exclude other processes too.
        may_sign: raises when this process may publish nothing any more; asked before the first signature of a
            publication, and once more before the timestamp makes it count.
        keep_releases: older releases than this many newest leave the metadata, unless a ring points at them.
    """

    def __init__(
        self,
        store: Artefacts,
        keys: CloudKeys | Callable[[], CloudKeys],
        clock: Clock,
        *,
        expiry: TufExpiry | None = None,
        lock: AbstractContextManager[object] | None = None,
        may_sign: Callable[[], None] = lambda: None,
        keep_releases: int = 16,
    ) -> None:
        self._may_sign = may_sign
        self._store = store
        source = (lambda: keys) if isinstance(keys, CloudKeys) else keys
        self._signing = RoleSigning(source, clock, expiry or TufExpiry())
        self._lock: AbstractContextManager[object] = lock or threading.Lock()
        self._keep_releases = keep_releases

    # ---- reading ----

    def read(self, path: str) -> bytes | None:
        """The bytes of `/metadata/…` or `/targets/…`, or None where nothing was published under that path."""
        key = served_key(path)
        return None if key is None else self._store.read(key)

    def is_initialised(self) -> bool:
        return self._store.size(_PREFIX + "metadata/timestamp.json") is not None

    @property
    def expiry(self) -> TufExpiry:
        """How long each role's signature holds."""
        return self._signing.expiry

    def first_root(self) -> bytes:
        """`1.root.json`: what a device is given at enrolment.

        Raises:
            ReleaseError: (operator) the repository was not initialised.
        """
        return self._required("metadata/1.root.json")

    def timestamp(self) -> bytes:
        """The newest `timestamp.json`, which an announcement carries.

        Raises:
            ReleaseError: (operator) the repository was not initialised.
        """
        return self._required("metadata/timestamp.json")

    def signed_at(self) -> float | None:
        """When the newest timestamp was signed (unix seconds); None where there is none, or it does not say."""
        data = self._store.read(_PREFIX + "metadata/timestamp.json")
        if data is None:
            return None
        signed = Metadata[Timestamp].from_bytes(data).signed.unrecognized_fields.get(SIGNED_AT)
        return float(signed) if isinstance(signed, int) else None

    def expiries(self) -> dict[str, float]:
        """When each role's newest signature ends, unix seconds: an alarm is due long before."""
        current = self._load()
        roles: dict[str, Signed] = {"timestamp": current.timestamp, "snapshot": current.snapshot}
        roles |= {"root": current.root, **current.targets}
        return {name: role.expires.timestamp() for name, role in roles.items()}

    def listed_keys(self) -> dict[str, list[str]]:
        """TUF's ids (hex) of the keys that count for each role."""
        current = self._load()
        return {role: [key.keyid for key in current.keys_of(role)] for role in ROLES}

    def ring(self, ring: str) -> tuple[int, int]:
        """What a ring runs: (release version, serial of its statement); (0, 0) where it was never set."""
        return self._ring(self._load(), ring)

    def releases(self) -> list[int]:
        """The release versions that a ring may point at, ascending."""
        return sorted({int(path.split("/")[1]) for path in self._load().targets["parameters"].targets})

    def audit_keys(self) -> bytes | None:
        """`keys/audit.json`, as signed: the public keys of the audit chain; None where it was never set."""
        target = self._load().targets["keys"].targets.get(AUDIT_JSON)
        return None if target is None else self._required(f"targets/{_named_by_hash(target)}")

    def keys_version(self) -> int:
        """The versions of all that lists keys (root, targets, `keys`), together: another number whenever another key
        of any kind counts."""
        current = self._load()
        return current.root.version + current.targets["targets"].version + current.targets["keys"].version

    def anchors(self) -> dict[str, Mapping[str, Any]]:
        """What was signed beside each ring's newest statement (`set_ring`), by the target's path."""
        listed = self._load().targets["rings"].targets
        found = {path: target.custom for path, target in listed.items()}
        return {path: custom for path, custom in found.items() if custom is not None}

    # ---- writing ----

    def init(self, *, online_keys: bytes) -> None:
        """Signs the first root and publishes an empty repository that lists the online keys.

        Raises:
            ConfigurationError: (operator) there is a repository already, or the offline keys are away.
        """
        with self._lock:
            if self.is_initialised():
                raise ConfigurationError("there is a TUF repository already", hint="it is never made twice")
            root, data = self._signing.first_root()
            empty = {name: Targets() for name in DELEGATED} | {"targets": self._signing.top_targets()}
            self._store.write_new(_PREFIX + "metadata/1.root.json", data)
            fresh = SignedSet(root, Timestamp(), Snapshot(meta={}), empty)
            for payload in (fresh.timestamp, fresh.snapshot, *empty.values()):
                payload.version = 0  # publication counts up
            self._add_files(fresh, "keys", {ONLINE_JSON: online_keys})
            self._publish(fresh, set(empty))

    def add_graphs(
        self, graphs_sha256: str, files: Mapping[str, bytes], *, signed: SigningRequest | None = None
    ) -> None:
        """Lists the graph files of a model, signed by the offline targets key. The same graphs again change
        nothing.

        Args:
            graphs_sha256: SHA-256 (hex) of `manifest.json`.
            files: name to bytes: what a device needs, `manifest.json` included.
            signed: what `request_graphs` gave, signed elsewhere; None signs here.

        Raises:
            ConfigurationError: (operator) the targets key is away.
            ReleaseError: (us) other bytes were published under these names; (operator) `signed` does not fit.
        """
        self._change(lambda current: self._list_graphs(current, graphs_sha256, files), signed)

    def request_graphs(self, graphs_sha256: str, files: Mapping[str, bytes], *, fleet: str) -> SigningRequest:
        """What the targets key has to sign for `add_graphs`, which is then called with the same files.

        Args:
            fleet: tenant and fleet, for the person who signs.
        """
        with self._lock:
            current = self._load()
            before = copy.deepcopy(current.files["targets"])
            self._list_graphs(current, graphs_sha256, files)
            return self._request("targets", current, before, fleet)

    def request_again(self, role: str, *, fleet: str) -> SigningRequest:
        """What the keys of `root` or `targets` have to sign for `sign_again`."""
        with self._lock:
            current = self._load()
            before = Metadata[Any].from_bytes(self._newest_root()) if role == "root" else current.files[role]
            return self._request(role, current, copy.deepcopy(before), fleet)

    def _list_graphs(self, current: SignedSet, graphs_sha256: str, files: Mapping[str, bytes]) -> set[str]:
        listed = {f"graphs/{graphs_sha256}/{name}": data for name, data in files.items()}
        return self._add_files(current, "targets", listed)

    def _request(self, role: str, current: SignedSet, before: Metadata[Any], fleet: str) -> SigningRequest:
        payload: Root | Targets = current.root if role == "root" else current.targets[role]
        payload.version = self._next_version(role, payload.version)
        payload.expires = self._signing.until(role)
        keys = tuple(key.keyid for key in current.keys_of(role))
        threshold = current.root.roles[role].threshold
        return SigningRequest(role, fleet, keys, threshold, Metadata(payload), before)

    def add_release(self, release: Release, files: Mapping[str, bytes]) -> None:
        """Lists the parameters of a release; no ring points at it yet.

        Args:
            files: `checkpoint.bin` and the golden files; `release.json` is made here.

        Raises:
            ReleaseError: (us) its graphs were never signed, or the version was published with other bytes.
        """

        def change(current: SignedSet) -> set[str]:
            graphs = f"graphs/{release.graphs_sha256}/"
            if not any(path.startswith(graphs) for path in current.targets["targets"].targets):
                raise ReleaseError(
                    f"release {release.version} is for graphs that were never signed",
                    hint="import the model's bundle with `shoal-cloud model import`",
                    graphs_sha256=release.graphs_sha256,
                )
            folder = f"parameters/{release.version}/"
            whole = {RELEASE: release.to_bytes(), **files}
            changed = self._add_files(
                current, "parameters", {folder + name: data for name, data in whole.items()}
            )
            self._prune(current, keep=release.version)
            return changed

        self._change(change)

    def set_ring(
        self, ring: str, version: int, *, rollback: bool = False, custom: Mapping[str, Any] | None = None
    ) -> int:
        """Signs which release a ring runs, and returns the statement's serial; the same release changes
        nothing.

        Args:
            custom: signed beside the statement, as TUF's `custom` of its target; devices ignore it.

        Raises:
            ReleaseError: (operator, us) no such release, or an older one without `rollback`.
        """
        serial = 0

        def change(current: SignedSet) -> set[str]:
            nonlocal serial
            before, serial_before = self._ring(current, ring)
            if f"parameters/{version}/{RELEASE}" not in current.targets["parameters"].targets:
                raise ReleaseError(f"there is no signed release {version}", version=version)
            if version < before and not rollback:
                raise ReleaseError(
                    f"ring {ring} runs release {before}, which is newer than {version}",
                    hint="going back needs a rollback",
                    version=version,
                    current=before,
                )
            if version == before:
                serial = serial_before
                return set()
            serial = serial_before + 1
            statement = {
                "release_version": version,
                "ring": ring,
                "rollback": rollback and version < before,
                "serial": serial,
            }
            return self._state_ring(current, statement, custom)

        self._change(change)
        return serial

    def _state_ring(
        self, current: SignedSet, statement: Mapping[str, Any], custom: Mapping[str, Any] | None
    ) -> set[str]:
        path = f"rings/{statement['ring']}.json"
        data = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
        changed = self._add_files(current, "rings", {path: data}, is_replacing=True)
        if custom is not None:
            current.targets["rings"].targets[path].unrecognized_fields["custom"] = dict(custom)
        return changed

    def set_online_keys(self, data: bytes) -> None:
        """Publishes a newer `keys/online.json`: rotation, or a stolen key taken off the list."""
        self._change(lambda current: self._add_files(current, "keys", {ONLINE_JSON: data}, is_replacing=True))

    def set_audit_keys(self, data: bytes) -> None:
        """Publishes a newer `keys/audit.json`; the same bytes change nothing."""
        self._change(lambda current: self._add_files(current, "keys", {AUDIT_JSON: data}, is_replacing=True))

    def set_authorities(self, pem: bytes) -> None:
        """Publishes the certificate authorities that devices trust (PEM); the same bytes change nothing."""
        self._change(
            lambda current: self._add_files(current, "keys", {AUTHORITIES_PEM: pem}, is_replacing=True)
        )

    def set_helper(self, data: bytes) -> None:
        """Names the fleet's helper, signed by the offline targets key: who has only online keys cannot name another.

        Raises:
            ConfigurationError: (operator) the targets key is away.
        """
        self._change(
            lambda current: self._add_files(current, "targets", {HELPER_JSON: data}, is_replacing=True)
        )

    def outrun(self, floor: int) -> None:
        """Signs everything anew, with versions and ring serials of at least `floor`: after a restore devices may know
        newer ones than the backup does, and would take it for an attack. Rings are stated as rollbacks, since a device
        may run a release that was made after the backup.

        The role of graphs is left as it is where its key is away.
        """

        def change(current: SignedSet) -> set[str]:
            roles = {name for name in current.targets if self._signing.has(current.keys_of(name))}
            for name in roles:
                current.targets[name].version = max(current.targets[name].version, floor)
            current.snapshot.version = max(current.snapshot.version, floor)
            current.timestamp.version = max(current.timestamp.version, floor)
            for path in list(current.targets["rings"].targets):
                ring = path.removeprefix("rings/").removesuffix(".json")
                version, serial = self._ring(current, ring)
                serial = max(serial, floor) + 1
                statement = {"release_version": version, "ring": ring, "rollback": True, "serial": serial}
                self._state_ring(current, statement, None)
            return roles

        self._change(change)

    def refresh(self) -> bool:
        """Signs again every online role that is past half of its life; True if any was."""
        is_signed = False

        def change(current: SignedSet) -> set[str]:
            nonlocal is_signed
            online: dict[str, Signed] = {name: current.targets[name] for name in DELEGATED}
            online |= {"snapshot": current.snapshot, "timestamp": current.timestamp}
            due = {name for name, payload in online.items() if self._signing.is_half_over(name, payload)}
            due |= current.unproven() & set(online)
            is_signed = bool(due)
            return due

        self._change(change)
        return is_signed

    def sign_again(self, role: str, *, signed: SigningRequest | None = None) -> None:
        """Signs `root` or `targets` for another life; the online roles are signed by `refresh`.

        Args:
            signed: what `request_again` gave, signed elsewhere; None signs here.

        Raises:
            ConfigurationError: (operator) the offline keys are away, or too few of them are here.
            ReleaseError: (operator) `signed` does not fit.
        """
        with self._lock:
            current = self._load()
            if signed is not None and signed.role != role:
                raise ReleaseError(f"the request is for {signed.role}", hint=f"sign {signed.role} with it")
            if role == "root" and signed is not None:
                self._write_signed("root", self._copy_of_root(current), signed, current.root)
            elif role == "root":
                self._write_root(self._copy_of_root(current), current.root)
            self._publish(current, {"timestamp"} if role == "root" else {role}, signed)

    def rotate(self, role: str, key: Key, *, replaced: str = "") -> None:
        """Lists another key for a role, and signs the role with it where it is online.

        A new root needs enough shares from before and after; a delegated role needs the targets key. If it stops
        half-way, `refresh` signs the rest.

        Args:
            key: the public half; its private one is where the repository's keys are, or has a URI there.
            replaced: TUF's id of the key that it takes the place of; the role's only one if empty.

        Raises:
            ConfigurationError: (operator) no such role or key, or the keys that have to sign are away.
        """
        with self._lock:
            current = self._load()
            if role not in ROLES:
                raise ConfigurationError(f"no role {role!r}", hint=f"one of {', '.join(ROLES)}")
            gone = _one_of([each.keyid for each in current.keys_of(role)], replaced, role)
            before = self._copy_of_root(current)
            current.change_key(role, key, gone)
            self._signing.require(role, current.keys_of(role))
            if role not in DELEGATED:
                self._write_root(current.root, before)
            elif role != "targets":
                self._signing.require("targets", current.keys_of("targets"))
            roles = {"root": {"timestamp"}, **{name: {"targets", name} for name in DELEGATED}}
            self._publish(current, roles.get(role, {role}))

    # ---- one publication ----

    def _change(self, change: Callable[[SignedSet], set[str]], signed: SigningRequest | None = None) -> None:
        """Applies a change to the newest set and publishes the roles that it names (nothing, when none)."""
        with self._lock:
            current = self._load()
            roles = change(current)
            if roles:
                self._publish(current, roles, signed)

    def _publish(self, current: SignedSet, roles: set[str], signed: SigningRequest | None = None) -> None:
        self._may_sign()
        if "targets" in roles and signed is None:
            self._signing.require("targets", current.keys_of("targets"))
        for name in sorted(roles & set(current.targets)):
            role = current.targets[name]
            if signed is not None and signed.role == name:
                self._write_signed(name, role, signed, current.root)
            else:
                role.version = self._next_version(name, role.version)
                self._write_versioned(name, role, current)
            current.snapshot.meta[f"{name}.json"] = MetaFile(version=role.version)
        if roles != {"timestamp"}:
            current.snapshot.version = self._next_version("snapshot", current.snapshot.version)
            self._write_versioned("snapshot", current.snapshot, current)
            current.timestamp.snapshot_meta = MetaFile(version=current.snapshot.version)
        current.timestamp.version += 1
        data = self._signing.signed("timestamp", current.timestamp, current.keys_of("timestamp"))
        self._may_sign()
        self._store.write(_PREFIX + "metadata/timestamp.json", data)

    def _next_version(self, role: str, version: int) -> int:
        """The next free version: a writer that died before its timestamp leaves versions nobody points at."""
        version += 1
        while self._store.size(f"{_PREFIX}metadata/{version}.{role}.json") is not None:
            version += 1
        return version

    def _write_versioned(self, role: str, payload: _Versioned, current: SignedSet) -> None:
        data = self._signing.signed(role, payload, current.keys_of(role))
        self._store.write_new(f"{_PREFIX}metadata/{payload.version}.{role}.json", data)

    def _write_signed(self, role: str, payload: Root | Targets, signed: SigningRequest, judge: Root) -> None:
        """Publishes a role as it was signed elsewhere, once it says just what we would have signed.

        Args:
            payload: the role as it is to be; takes the version and the end that were signed.
            judge: lists the keys.
        """
        ready = signed.metadata.signed
        version = self._next_version(role, payload.version)
        payload.version, payload.expires = version, ready.expires
        if ready.to_dict() != payload.to_dict():
            raise ReleaseError(
                "the signed request is not for what is here now",
                hint="make it anew (--request), and sign that",
            )
        try:
            judge.verify_delegate(role, signed.metadata.signed_bytes, signed.metadata.signatures)
        except UnsignedMetadataError as error:
            raise ReleaseError(
                f"the request has not the {signed.threshold} signatures that {role} needs",
                hint="sign it: shoal-cloud sign FILE --keys DIR --out SIGNED",
            ) from error
        self._store.write_new(f"{_PREFIX}metadata/{version}.{role}.json", signed.file())

    def _add_files(
        self, current: SignedSet, role: str, files: Mapping[str, bytes], *, is_replacing: bool = False
    ) -> set[str]:
        """Writes target files and lists them in a role; returns the role if anything is new."""
        listed = current.targets[role].targets
        changed: set[str] = set()
        for path, data in sorted(files.items()):
            target = TargetFile.from_data(path, data, ["sha256"])
            if path in listed and listed[path].hashes == target.hashes:
                continue
            if path in listed and not is_replacing:
                raise ReleaseError(f"{path} was published with other bytes", path=path)
            folder, _, name = path.rpartition("/")
            self._store.write_new(f"{_PREFIX}targets/{folder}/{target.hashes['sha256']}.{name}", data)
            listed[path] = target
            changed = {role}
        return changed

    def _prune(self, current: SignedSet, *, keep: int) -> None:
        """Old releases leave the list that every device downloads; their files stay."""
        listed = current.targets["parameters"].targets
        versions = sorted({int(path.split("/")[1]) for path in listed})
        in_rings = {self._ring(current, path[6:-5])[0] for path in current.targets["rings"].targets}
        gone = {str(version) for version in versions[: -self._keep_releases]} - {
            str(version) for version in in_rings | {keep}
        }
        for path in [path for path in listed if path.split("/")[1] in gone]:
            del listed[path]

    # ---- the parts of a set ----

    def _load(self) -> SignedSet:
        return SignedSet.load(self._required, self._newest_root())

    def _copy_of_root(self, current: SignedSet) -> Root:
        return copy.deepcopy(current.root)

    def _write_root(self, root: Root, before: Root) -> None:
        data = self._signing.next_root(before, root)
        self._store.write_new(f"{_PREFIX}metadata/{root.version}.root.json", data)

    def _ring(self, current: SignedSet, ring: str) -> tuple[int, int]:
        path = f"rings/{ring}.json"
        target = current.targets["rings"].targets.get(path)
        if target is None:
            return 0, 0
        statement = json.loads(self._required(f"targets/{_named_by_hash(target)}"))
        return int(statement["release_version"]), int(statement["serial"])

    def _newest_root(self) -> bytes:
        version = 1
        while self._store.size(f"{_PREFIX}metadata/{version + 1}.root.json") is not None:
            version += 1
        return self._required(f"metadata/{version}.root.json")

    def _required(self, path: str) -> bytes:
        data = self.read(path)
        if data is None:
            raise ReleaseError(
                f"the TUF repository has no {path}", hint="make it with `shoal-cloud init`", path=path
            )
        return data


def _named_by_hash(target: TargetFile) -> str:
    """Where a target lies (TUF's consistent snapshots)."""
    folder, _, name = target.path.rpartition("/")
    return f"{folder}/{target.hashes['sha256']}.{name}"


def served_key(path: str) -> str | None:
    """Where a path that a device asks for lies in the store; None where it can name nothing of TUF's."""
    name = path.removeprefix("/")
    is_ours = name.startswith(("metadata/", "targets/")) and is_key(name)
    return _PREFIX + name if is_ours else None


def _one_of(key_ids: list[str], wanted: str, role: str) -> str:
    """The key that is meant by the beginning of its id.

    Raises:
        ConfigurationError: (operator) none, or more than one.
    """
    meant = [name for name in key_ids if name.startswith(wanted)]
    if len(meant) != 1:
        raise ConfigurationError(
            f"{len(meant)} keys of {role} begin with {wanted!r}",
            hint="`shoal-cloud keys show` lists them",
        )
    return meant[0]
