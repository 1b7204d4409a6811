"""The aggregator's keys of today: what updates are sealed to, and whose orders count.

Laws of the file: keys come from enrolment, later from TUF, and from nowhere else; what TUF said last is kept, so that
a device which starts without a network trusts the keys of its last check and not those of its first day (a stolen key
that was taken off the list must not come back with a restart). Source: docs/architecture.md, "TUF layout".
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from edge_agent.enrolment.identity import Identity
from wire.enrolment import DeviceId, OnlineKey
from wire.errors import ReleaseError
from wire.primitives import key_id

ONLINE_KEYS: Final = "keys/online.json"
ONLINE_KEYS_FACT: Final = "online_keys"


class _File(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kem: Annotated[tuple[OnlineKey, ...], Meta(min_length=1, max_length=8)]
    orders: Annotated[tuple[OnlineKey, ...], Meta(min_length=1, max_length=8)]
    tenant: DeviceId
    fleet: DeviceId


@dataclass(frozen=True, slots=True)
class OnlineKeys:
    """The aggregator's keys of today, as TUF vouches for them.

    Attributes:
        kem: (key id of 8 bytes, algorithm, public key) to seal to, the preferred one first.
        orders: (key id, raw Ed25519 public key) that may sign messages downward.
        version: of the signed metadata that lists them; 0 where nobody said.
    """

    tenant: str
    fleet: str
    kem: tuple[tuple[bytes, str, bytes], ...]
    orders: tuple[tuple[bytes, bytes], ...]
    version: int = field(default=0, compare=False)

    @classmethod
    def from_json(cls, data: bytes, *, version: int = 0) -> OnlineKeys:
        """Reads `keys/online.json`, whose signature the caller has checked.

        Raises:
            ReleaseError: (peer) it is not such a file, or lists a key under another key's id.
        """
        try:
            listed = msgspec.json.decode(data, type=_File, strict=True)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ReleaseError(f"{ONLINE_KEYS} is signed, but not what it should be: {error}") from error
        for key in (*listed.kem, *listed.orders):
            if key_id(bytes.fromhex(key.public)).hex() != key.id:
                raise ReleaseError(f"{ONLINE_KEYS} lists a key under another key's id", key_id=key.id)
        found = cls._listed(listed.tenant, listed.fleet, listed.kem, listed.orders)
        return replace(found, version=version)

    @classmethod
    def of_enrolment(cls, identity: Identity) -> OnlineKeys:
        """The online keys of the day of enrolment."""
        return cls._listed(identity.tenant, identity.fleet, identity.kem, identity.orders)

    @classmethod
    def _listed(
        cls, tenant: str, fleet: str, kem: tuple[OnlineKey, ...], orders: tuple[OnlineKey, ...]
    ) -> OnlineKeys:
        return cls(
            tenant=tenant,
            fleet=fleet,
            kem=tuple((bytes.fromhex(key.id), key.algorithm, bytes.fromhex(key.public)) for key in kem),
            orders=tuple((bytes.fromhex(key.id), bytes.fromhex(key.public)) for key in orders),
        )

    def to_json(self) -> bytes:
        """What `from_json` reads."""
        listed = {
            "kem": [
                {"id": name.hex(), "algorithm": algorithm, "public": public.hex()}
                for name, algorithm, public in self.kem
            ],
            "orders": [{"id": name.hex(), "public": public.hex()} for name, public in self.orders],
            "tenant": self.tenant,
            "fleet": self.fleet,
        }
        return msgspec.json.encode(listed)
