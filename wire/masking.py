"""What both sides of a masked round compute alike: the ring, who shares with whom, what is signed, and the masks.

Laws of the file: pure; integers wrap modulo the ring and are never rounded, so that masks cancel bit for bit; every
key is derived for one round of one run and one roster (`context`), so that nothing of one round means anything in
another. Sources: docs/protocol.md, clause 13; Bonawitz et al. 2017 (pairwise masks), Bell et al. 2020 (neighbours
instead of all; SecAgg+).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from wire.cbor import encode_canonical
from wire.errors import MessageError, UpdateError
from wire.messages import MaskMember, MaskTerms, RingName
from wire.primitives import AgreementKey, Keystream, hkdf, sha256

SECRET_BYTES: Final = 16
"""Length of a seed that is shared. 128 bits are what X25519 gives, and a share is as long as its secret."""
SEALED_SHARES_BYTES: Final = 2 * SECRET_BYTES + 16
MIN_MEMBERS: Final = 3
MAX_MEMBERS: Final = 1024
MAX_DEGREE: Final = 254
_TILE: Final = 65_536
_NARROW_NOISE: Final = 0.002

RingVector = NDArray[Any]
"""uint16 or uint32 [P]."""


class Randomness(Protocol):
    """Where random bytes come from; `wire.codec.Randomness` by another name would be the same."""

    def bytes(self, length: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Ring:
    """Numbers modulo 2^`bits`, and how a parameter's change becomes one.

    Attributes:
        bits: 16 or 32.
        value_bits: of one device's number; the sum of all of them stays below 2^bits.
        bound: largest absolute change of a parameter.
    """

    bits: int
    value_bits: int
    bound: float

    @property
    def name(self) -> RingName:
        return "ring16" if self.bits == 16 else "ring32"

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.bits == 16 else "<u4")

    @property
    def step(self) -> float:
        """What one unit stands for."""
        return 2.0 * self.bound / ((1 << self.value_bits) - 1)


def choose_ring(members: int, params_size: int, bound: float) -> Ring:
    """The ring of a round: 16 bits where that costs nothing that matters, else 32.

    Rounding at random leaves at most √(P / n) · step / 2 (L2 norm) in the mean of n devices; 16 bits are taken when
    that is at most a five-hundredth of `bound`.

    Args:
        members: most devices that may be summed, up to `MAX_MEMBERS`.
        bound: no update is longer (L2 norm), so no parameter changes by more.
    """
    narrow = Ring(16, _value_bits(16, members), bound)
    noise = (params_size / members) ** 0.5 * narrow.step / 2
    return narrow if noise <= _NARROW_NOISE * bound else Ring(32, _value_bits(32, members), bound)


def ring_of(terms: MaskTerms) -> Ring:
    """The ring that a round's terms name.

    Raises:
        MessageError: (peer) the sum of all members would not fit.
    """
    ring = Ring(16 if terms.ring == "ring16" else 32, terms.value_bits, terms.bound)
    if terms.members * ((1 << ring.value_bits) - 1) >= 1 << ring.bits:
        raise MessageError("the sum of a masked round would overflow its ring", members=terms.members)
    return ring


def _value_bits(bits: int, members: int) -> int:
    return (((1 << bits) - 1) // members + 1).bit_length() - 1


def encode_ring(vector: NDArray[np.float32], ring: Ring, rng: Randomness) -> RingVector:
    """Numbers of the ring, rounded at random to a neighbour, so that the expected value is the value.

    Args:
        vector: finite float32 [P]; what lies beyond the bound is cut there.
    """
    highest = float((1 << ring.value_bits) - 1)
    encoded = np.empty(len(vector), ring.dtype)
    for start in range(0, len(vector), _TILE):
        tile = vector[start : start + _TILE].astype(np.float64)
        noise = np.frombuffer(rng.bytes(4 * len(tile)), "<u4") * 2.0**-32
        levels = np.floor((tile + ring.bound) / ring.step + noise)
        encoded[start : start + len(tile)] = np.clip(levels, 0.0, highest).astype(ring.dtype)
    return encoded


def decode_mean(total: RingVector, ring: Ring, count: int) -> NDArray[np.float32]:
    """The mean of `count` updates from the sum of their numbers, float32 [P]."""
    mean = np.empty(len(total), np.float32)
    for start in range(0, len(total), _TILE):
        tile = total[start : start + _TILE].astype(np.float64)
        mean[start : start + len(tile)] = tile * (ring.step / count) - ring.bound
    return mean


def ring_vector(payload: bytes, ring: Ring, params_size: int) -> RingVector:
    """Reads the payload of a masked update; every number of the ring is valid.

    Raises:
        UpdateError: (peer) another length.
    """
    if len(payload) != params_size * ring.dtype.itemsize:
        raise UpdateError("masked update has a wrong length", size_bytes=len(payload))
    return np.frombuffer(payload, ring.dtype)


def add_mask(values: RingVector, key: bytes, *, negative: bool = False) -> None:
    """Adds a key's mask to `values` [P] in place, or takes it away; wraps modulo the ring."""
    stream, size = Keystream(key), values.dtype.itemsize
    zeros = memoryview(bytes(min(_TILE, len(values)) * size))
    for start in range(0, len(values), _TILE):
        tile = values[start : start + _TILE]
        mask = np.frombuffer(stream.next(zeros[: len(tile) * size]), values.dtype)
        if negative:
            np.subtract(tile, mask, out=tile)
        else:
            np.add(tile, mask, out=tile)


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
    whole = ["shoal masking", tenant, fleet, run, round_number, *named, terms.bound]
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
