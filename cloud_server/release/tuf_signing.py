"""Who signs what, and for how long: the roles of The Update Framework, their keys and expiries. With
`tuf_repository.py` the cloud's door to tuf.

Laws of the file: what is signed expires at a time that follows from its role; a role whose key is away is an error that
says so before anything is written; delegated roles share no path. Sources: TUF specification 1.0.33,
docs/architecture.md, "TUF layout".
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, TypeVar

from securesystemslib.signer import Signature, SSlibKey
from securesystemslib.signer import Signer as TufSigner
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

from cloud_server.keys import ROOT_THRESHOLD, CloudKeys
from process.clock import Clock
from wire.errors import ConfigurationError
from wire.primitives import SigningKey, sha256

DELEGATED: Final[dict[str, list[str]]] = {
    "parameters": ["parameters/*/*"],
    "keys": ["keys/*"],
    "rings": ["rings/*"],
}
"""The online roles below targets, and the paths that each may list."""
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

    def __init__(self, keys: CloudKeys, clock: Clock, expiry: TufExpiry) -> None:
        self._keys = keys
        self._clock = clock
        self._expiry = expiry

    def first_root(self) -> bytes:
        """The first `root.json`, signed by every share.

        Raises:
            ConfigurationError: (operator) too few shares are here, or another offline key is away.
        """
        if len(self._keys.root) < ROOT_THRESHOLD:
            raise _offline("root shares")
        root = Root(version=1, expires=self._until("root"), consistent_snapshot=True)
        for share in self._keys.root:
            root.add_key(_public(share), "root")
        root.roles["root"].threshold = ROOT_THRESHOLD
        for role in ("targets", "snapshot", "timestamp"):
            root.add_key(_public(self._key(role)), role)
        return _serialized(root, list(self._keys.root))

    def top_targets(self) -> Targets:
        """Top-level targets: no graphs yet, and one delegation per online role, none sharing a path."""
        public = {name: _public(self._key(name)) for name in DELEGATED}
        roles = {
            name: DelegatedRole(name, [public[name].keyid], 1, terminating=True, paths=paths)
            for name, paths in DELEGATED.items()
        }
        delegations = Delegations(keys={key.keyid: key for key in public.values()}, roles=roles)
        return Targets(delegations=delegations)

    def require(self, role: str) -> None:
        """Makes sure that a role's key is here; raises like `signed`."""
        self._key(role)

    def has(self, role: str) -> bool:
        """Whether a role's key is here."""
        return isinstance(getattr(self._keys, role), SigningKey)

    def signed(self, role: str, payload: _Payload) -> bytes:
        """The metadata file of a role, which holds from now on for as long as the role's signatures do.

        Raises:
            ConfigurationError: (operator) the role's key is away.
        """
        key = self._key(role)
        payload.expires = self._until(role)
        return _serialized(payload, [key])

    def is_half_over(self, role: str, payload: Signed) -> bool:
        """Whether more than half of a signature's life has passed."""
        life_seconds: float = getattr(self._expiry, role) * _DAY
        return payload.expires.timestamp() - self._clock.now() < life_seconds / 2

    def _key(self, role: str) -> SigningKey:
        key = getattr(self._keys, role)
        if not isinstance(key, SigningKey):
            raise _offline(f"{role} key")
        return key

    def _until(self, role: str) -> datetime:
        now = datetime.fromtimestamp(self._clock.now(), tz=UTC)
        return (now + timedelta(days=getattr(self._expiry, role))).replace(microsecond=0)


class _KeySigner(TufSigner):
    """Our signing key behind securesystemslib's seam (where an HSM or a KMS would stand)."""

    def __init__(self, key: SigningKey) -> None:
        self._key = key

    @property
    def public_key(self) -> SSlibKey:
        return _public(self._key)

    def sign(self, payload: bytes) -> Signature:
        return Signature(self.public_key.keyid, self._key.sign(payload).hex())

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: object, secrets_handler: object = None
    ) -> _KeySigner:
        raise NotImplementedError("keys are loaded by cloud_server.keys")


def _public(key: SigningKey) -> SSlibKey:
    # TUF leaves the key id to us: the hash of the raw key, whose first 8 bytes are our own key id.
    return SSlibKey(
        keyid=sha256(key.public_bytes).hex(),
        keytype="ed25519",
        scheme="ed25519",
        keyval={"public": key.public_bytes.hex()},
    )


def _serialized(payload: _Payload, keys: list[SigningKey]) -> bytes:
    metadata = Metadata(payload)
    for key in keys:
        metadata.sign(_KeySigner(key), append=True)
    return metadata.to_bytes(JSONSerializer(compact=True))


def _offline(what: str) -> ConfigurationError:
    return ConfigurationError(f"the {what} is not here", hint="put keys/offline back for this command")
