"""What both sides of a masked round compute alike: who shares with whom, what is signed, and the keys of the masks.

Laws of the file: pure; every key is derived for one round of one run and one roster (`context`), so that nothing of one
round means anything in another. Sources: docs/protocol.md, clause 13; Bonawitz et al. 2017 (pairwise masks), Bell et
al. 2020 (neighbours instead of all; SecAgg+).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from wire.cbor import encode_canonical
from wire.errors import MessageError
from wire.mask_terms import MAX_MASK_DEGREE, MAX_MASK_MEMBERS, MaskTerms
from wire.messages import MaskMember
from wire.primitives import AgreementKey, hkdf, sha256

SECRET_BYTES: Final = 16
"""Length of a seed that is shared. 128 bits are what X25519 gives, and a share is as long as its secret."""
SEALED_SHARES_BYTES: Final = 2 * SECRET_BYTES + 16
MIN_MEMBERS: Final = 3
MAX_MEMBERS: Final = MAX_MASK_MEMBERS
MAX_DEGREE: Final = MAX_MASK_DEGREE


@dataclass(frozen=True)
class Roster:
    """The devices that a round was opened with, in the order of their names: who may take part, and nobody else.

    Attributes:
        members: name and update key (32 bytes) of each.
    """

    members: tuple[tuple[str, bytes], ...]

    @classmethod
    def of(cls, members: Sequence[tuple[str, bytes]]) -> Roster:
        """In canonical order.

        Raises:
            MessageError: a name or a key twice, or not `MIN_MEMBERS` to `MAX_MEMBERS` of them.
        """
        if not MIN_MEMBERS <= len(members) <= MAX_MEMBERS:
            raise MessageError("a masked round cannot have so many members", members=len(members))
        if any(len({member[part] for member in members}) != len(members) for part in (0, 1)):
            raise MessageError("a roster names a device or a key twice")
        return cls(tuple(sorted(members)))

    @classmethod
    def read(cls, members: Sequence[MaskMember]) -> Roster:
        """From a message; raises as `of`."""
        return cls.of([(member.device, member.key) for member in members])

    @cached_property
    def sha256(self) -> bytes:
        return sha256(encode_canonical(["shoal masking roster", [list(member) for member in self.members]]))

    @cached_property
    def places(self) -> dict[str, int]:
        return {device: place for place, (device, _) in enumerate(self.members)}

    @cached_property
    def devices(self) -> tuple[str, ...]:
        return tuple(device for device, _ in self.members)

    def key_of(self, device: str) -> bytes:
        """The update key of a member."""
        return self.members[self.places[device]][1]


def neighbours(members: int, degree: int, seed: bytes) -> tuple[tuple[int, ...], ...]:
    """Whom each member shares with: a ring in random order where everybody knows `degree` / 2 on each side.

    Symmetric; with `degree` ≥ members − 1 everybody knows all others.

    Args:
        degree: even, or members − 1.
        seed: decides the order; the same seed gives the same graph on every machine.

    Returns:
        For each member the places of its neighbours, ascending.
    """
    if degree >= members - 1:
        return tuple(tuple(other for other in range(members) if other != place) for place in range(members))
    order = sorted(range(members), key=lambda place: sha256(seed + place.to_bytes(4, "big")))
    offsets = [offset for offset in range(-(degree // 2), degree // 2 + 1) if offset]
    found: dict[int, tuple[int, ...]] = {}
    for position, place in enumerate(order):
        found[place] = tuple(sorted(order[(position + offset) % members] for offset in offsets))
    return tuple(found[place] for place in range(members))


@dataclass(frozen=True)
class MaskGroup:
    """One masked round as every member and the cloud see it: names, terms, and what follows from them."""

    tenant: str
    fleet: str
    run: str
    round_number: int
    terms: MaskTerms
    roster: Roster

    @cached_property
    def context(self) -> bytes:
        return context_of(self.tenant, self.fleet, self.run, self.round_number, self.terms)

    @cached_property
    def _near(self) -> dict[str, dict[str, int]]:
        devices, seed = self.roster.devices, b"shoal masking graph" + self.context
        graph = neighbours(len(devices), self.terms.degree, seed)
        return {
            device: {devices[other]: place for place, other in enumerate(near)}
            for device, near in zip(devices, graph, strict=True)
        }

    def neighbours_of(self, device: str) -> tuple[str, ...]:
        """The names of a member's neighbours, in the order in which messages list them."""
        return tuple(self._near[device])

    def place_of(self, device: str, neighbour: str) -> int:
        """Where `neighbour` stands among the neighbours of `device`."""
        return self._near[device][neighbour]

    def is_added(self, device: str, other: str) -> bool:
        """Whether `device` adds the mask that it has in common with `other`, who then takes it away."""
        return self.roster.places[device] < self.roster.places[other]


def context_of(tenant: str, fleet: str, run: str, round_number: int, terms: MaskTerms) -> bytes:
    """SHA-256 of everything that the keys of a masked round are bound to."""
    named = [terms.roster_sha256, terms.members, terms.degree, terms.threshold, terms.ring, terms.value_bits]
    whole = ["shoal masking", tenant, fleet, run, round_number, *named, terms.bound, *terms.bound_to]
    return sha256(encode_canonical(whole))


def keys_statement(
    context: bytes, device: str, mask_key: bytes, channel_key: bytes, commitment: bytes
) -> bytes:
    """What a device signs with its update key about its keys of a round."""
    return encode_canonical(["shoal masking keys", context, device, mask_key, channel_key, commitment])


def commitment_of(context: bytes, self_seed: bytes) -> bytes:
    """Binds a device to the seed of its own mask without telling it: wrong shares are found out."""
    return hkdf(self_seed, b"shoal masking commitment" + context)


def mask_key_of(context: bytes, mask_seed: bytes) -> AgreementKey:
    """The private key that pairwise masks are agreed with, from the seed that is shared."""
    return AgreementKey(hkdf(mask_seed, b"shoal masking key" + context))


def self_mask_key(context: bytes, self_seed: bytes) -> bytes:
    """The key of a device's own mask."""
    return hkdf(self_seed, b"shoal masking self" + context)


def pair_mask_key(context: bytes, own: AgreementKey, other_public: bytes) -> bytes:
    """The key of the mask that two members have in common; either of them derives it.

    Raises:
        TrustError: (peer) the other's public key is none.
    """
    return hkdf(own.agree(other_public), b"shoal masking pair" + context)


def channel_secret(
    context: bytes, own: AgreementKey, other_public: bytes, sender: str, receiver: str
) -> bytes:
    """The key that `sender` seals shares to `receiver` with; it seals one message.

    Raises:
        TrustError: (peer) the other's public key is none.
    """
    named = encode_canonical(["shoal masking share", context, sender, receiver])
    return hkdf(own.agree(other_public), named)
