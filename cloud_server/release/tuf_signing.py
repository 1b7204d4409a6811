"""Who signs what, and for how long: the roles of The Update Framework, their keys and expiries.

Laws of the file: what is signed expires at a time that follows from its role; the signed metadata says which keys are a
role's, never a file's name; a role whose key is away is an error that says so before anything is written; delegated
roles share no path. A key is a file of ours or whatever securesystemslib's `Signer` reaches by a URI (`hsm:`,
`awskms:`, `gcpkms:`, `azurekms:`, `hv:`, `file2:`, …). Sources: TUF specification 1.0.33, docs/architecture.md,
"TUF layout".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from securesystemslib.exceptions import Error as SslibError
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, Key, Signature, SSlibKey
from securesystemslib.signer import Signer as TufSigner
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    Root,
    Signed,
    Snapshot,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from cloud_server.keys import ROOT_THRESHOLD, CloudKeys, read_signing_key
from process.clock import Clock
from wire.errors import ConfigurationError
from wire.primitives import SigningKey, sha256

DELEGATED: Final[dict[str, list[str]]] = {
    "parameters": ["parameters/*/*"],
    "keys": ["keys/*"],
    "rings": ["rings/*"],
}
"""The online roles below targets, and the paths that each may list."""
TOP_LEVEL: Final = ("targets", "snapshot", "timestamp")
"""The roles whose keys the root lists."""
SIGNED_AT: Final = "shoal_signed_at"
"""When a timestamp was signed (unix seconds): devices move their time floor by it."""
FILE_SCHEME: Final = "shoal"
_DAY: Final = 86_400.0

_Payload = TypeVar("_Payload", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True)
class TufExpiry:
    """How long each role's signature holds, in days. Online roles are signed again at half of it."""

    root: float = 365.0
    targets: float = 180.0
    parameters: float = 60.0
    keys: float = 60.0
    rings: float = 60.0
    snapshot: float = 14.0
    timestamp: float = 1.0


class RoleSigning:
    """The signatures of one deployment; a role is named as in TUF, or in `DELEGATED`."""

    def __init__(self, keys: Callable[[], CloudKeys], clock: Clock, expiry: TufExpiry) -> None:
        self._keys = keys
        self._clock = clock
        self.expiry = expiry

    def first_root(self) -> tuple[Root, bytes]:
        """The first root and its file, signed by every share.

        Raises:
            ConfigurationError: (operator) too few shares are here, or another offline key is away.
        """
        keys = self._keys()
        if len(keys.root) < ROOT_THRESHOLD:
            raise _offline("root shares")
        root = Root(version=1, expires=self.until("root"), consistent_snapshot=True)
        for share in keys.root:
            root.add_key(public_key(share), "root")
        root.roles["root"].threshold = ROOT_THRESHOLD
        for role in TOP_LEVEL:
            root.add_key(public_key(self._newest(role)), role)
        return root, _serialized(root, [FileSigner(share) for share in keys.root])

    def top_targets(self) -> Targets:
        """Top-level targets: no graphs yet, and one delegation per online role, none sharing a path."""
        public = {name: public_key(self._newest(name)) for name in DELEGATED}
        roles = {
            name: DelegatedRole(name, [public[name].keyid], 1, terminating=True, paths=paths)
            for name, paths in DELEGATED.items()
        }
        delegations = Delegations(keys={key.keyid: key for key in public.values()}, roles=roles)
        return Targets(delegations=delegations)

    def require(self, role: str, listed: Sequence[Key]) -> None:
        """Makes sure that one of a role's keys is here; raises like `signed`."""
        self._signers(role, listed)

    def has(self, listed: Sequence[Key]) -> bool:
        """Whether one of these keys is here."""
        keys = self._keys()
        here = {public_key(key).keyid for key in keys.role_keys()} | set(keys.signers)
        return any(key.keyid in here for key in listed)

    def signed(self, role: str, payload: _Payload, listed: Sequence[Key]) -> bytes:
        """The metadata file of a role, which holds from now on for as long as the role's signatures do.

        Args:
            listed: the role's keys, as root or targets list them; every one that is here signs.

        Raises:
            ConfigurationError: (operator) the role's key is away, or what holds it does not sign.
        """
        signers = self._signers(role, listed)
        payload.expires = self.until(role)
        if isinstance(payload, Timestamp):
            payload.unrecognized_fields[SIGNED_AT] = int(self._clock.now())
        return _serialized(payload, signers)

    def next_root(self, before: Root, root: Root) -> bytes:
        """The file of a newer root, signed by enough shares of the one before it and by enough of its own.

        Raises:
            ConfigurationError: (operator) too few root shares are here.
        """
        root.version = before.version + 1
        # One share may stand in both; it signs once.
        listed = {key.keyid: key for each in (before, root) for key in listed_keys(each, "root")}
        data = self.signed("root", root, list(listed.values()))
        signed = Metadata[Root].from_bytes(data)
        try:
            for judge in (before, root):
                judge.verify_delegate("root", signed.signed_bytes, signed.signatures)
        except UnsignedMetadataError as error:
            raise ConfigurationError(
                "too few root shares are here",
                hint=f"{ROOT_THRESHOLD} of the shares before and {ROOT_THRESHOLD} of those after have to sign",
            ) from error
        return data

    def is_half_over(self, role: str, payload: Signed) -> bool:
        """Whether more than half of a signature's life has passed."""
        life_seconds: float = getattr(self.expiry, role) * _DAY
        return payload.expires.timestamp() - self._clock.now() < life_seconds / 2

    def _newest(self, role: str) -> SigningKey:
        key = getattr(self._keys(), role)
        if not isinstance(key, SigningKey):
            raise _offline(f"{role} key")
        return key

    def _signers(self, role: str, listed: Sequence[Key]) -> list[TufSigner]:
        keys = self._keys()
        here = {public_key(key).keyid: key for key in keys.role_keys()}
        signers: list[TufSigner] = []
        for key in listed:
            if key.keyid in here:
                signers.append(FileSigner(here[key.keyid]))
            elif key.keyid in keys.signers:
                signers.append(_reach(role, keys.signers[key.keyid], key))
        if not signers:
            raise _offline("root shares" if role == "root" else f"{role} key")
        return signers

    def until(self, role: str) -> datetime:
        """When a signature of now ends."""
        now = datetime.fromtimestamp(self._clock.now(), tz=UTC)
        return (now + timedelta(days=getattr(self.expiry, role))).replace(microsecond=0)


class FileSigner(TufSigner):
    """A signing key of ours behind securesystemslib's seam, where an HSM or a KMS stands as well.

    Its URI is `shoal:PATH` of a key file.
    """

    def __init__(self, key: SigningKey) -> None:
        self._key = key

    @property
    def public_key(self) -> SSlibKey:
        return public_key(self._key)

    def sign(self, payload: bytes) -> Signature:
        return Signature(self.public_key.keyid, self._key.sign(payload).hex())

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: object = None
    ) -> FileSigner:
        scheme, _, path = priv_key_uri.partition(":")
        if scheme != FILE_SCHEME:
            raise ValueError(f"{priv_key_uri!r} is not {FILE_SCHEME}:PATH")
        signer = cls(read_signing_key(Path(path)))
        if signer.public_key.keyid != public_key.keyid:
            raise ValueError(f"{path} holds another key")
        return signer


SIGNER_FOR_URI_SCHEME[FILE_SCHEME] = FileSigner


def listed_keys(lister: Root | Targets, role: str) -> list[Key]:
    """The keys that a root lists for a top-level role, or targets for a delegated one."""
    if isinstance(lister, Root):
        return [lister.keys[name] for name in lister.roles[role].keyids]
    delegations = lister.delegations
    if delegations is None or delegations.roles is None:
        return []
    return [delegations.keys[name] for name in delegations.roles[role].keyids]


def public_key(key: SigningKey) -> SSlibKey:
    """The public half as TUF lists it."""
    # TUF leaves the key id to us: the hash of the raw key, whose first 8 bytes are our own key id.
    return SSlibKey(
        keyid=sha256(key.public_bytes).hex(),
        keytype="ed25519",
        scheme="ed25519",
        keyval={"public": key.public_bytes.hex()},
    )


def read_public_key(data: bytes) -> Key:
    """A public key as securesystemslib writes it: JSON of `keyid`, `keytype`, `scheme` and `keyval`.

    Raises:
        ConfigurationError: (operator) it is none.
    """
    try:
        plain = json.loads(data)
        return Key.from_dict(plain.pop("keyid"), plain)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigurationError(
            f"not a public key: {error}",
            hint='write what the signer\'s import_() gave: {"keyid": …} and its to_dict()',
        ) from error


def _reach(role: str, uri: str, key: Key) -> TufSigner:
    try:
        return TufSigner.from_priv_key_uri(uri, key)
    except (SslibError, ValueError, OSError, ImportError) as error:
        raise _mute(role, uri, error) from error


def _serialized(payload: _Payload, signers: Sequence[TufSigner]) -> bytes:
    metadata = Metadata(payload)
    for signer in signers:
        try:
            metadata.sign(signer, append=True)
        except UnsignedMetadataError as error:
            raise _mute(payload.type, signer.public_key.keyid, error) from error
    return metadata.to_bytes(JSONSerializer(compact=True))


def _offline(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"the {what} is not here", hint="put keys/offline back for this command, or name its place: --offline"
    )


def _mute(role: str, where: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"the {role} key at {where} does not sign: {error}", hint="see signers.json in the key folder"
    )
