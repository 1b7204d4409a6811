"""The terms of a round whose updates come under masks, as an order carries them. Types and bounds only.

Source: docs/protocol.md, clauses 13 and 15.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

RingName = Literal["ring16", "ring32"]
RING_BYTES: dict[str, int] = {"ring16": 2, "ring32": 4}
MAX_MASK_MEMBERS = 1024
MAX_MASK_DEGREE = 254
MAX_HELPED_MEMBERS = 16_384
_KEY_ID_BYTES = 8


class NoiseTerms(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The noise that each device adds to its own update (clause 13.13), so that the sum is private.

    Attributes:
        clipping_norm: C: no update counts for more (L2).
        radius: what C is on the lattice.
        sigma: standard deviation of one device's noise on the lattice.
        quorum: fewest devices whose noise is enough; no sum of fewer is unmasked.
    """

    clipping_norm: Annotated[float, Meta(gt=0.0, le=1e9)]
    radius: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    sigma: Annotated[int, Meta(ge=1, le=2**24)]
    quorum: Annotated[int, Meta(ge=1, le=MAX_HELPED_MEMBERS)]


class RingTerms(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a parameter's change becomes a number of the ring, whatever hides it.

    Attributes:
        members: most devices that are summed: their sum fits the ring.
        ring, value_bits, bound: see `wire.ring.Ring`.
        noise: under distributed differential privacy; `value_bits` and `bound` then say nothing.
    """

    members: Annotated[int, Meta(ge=3, le=MAX_HELPED_MEMBERS)]
    ring: RingName
    value_bits: Annotated[int, Meta(ge=1, le=31)]
    bound: Annotated[float, Meta(gt=0.0, le=1e9)]
    noise: NoiseTerms | None = None

    @property
    def bound_to(self) -> list[int | float]:
        """What a round's context says of the noise: nothing where there is none."""
        noise = self.noise
        return [] if noise is None else [noise.clipping_norm, noise.radius, noise.sigma, noise.quorum]


class MaskTerms(RingTerms, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Masks that devices agree on in pairs (clause 13); every key of the round is bound to these values.

    Attributes:
        roster_sha256: of the devices that the round was opened with; `members` of them.
        degree: neighbours of a device. threshold: shares that give back a secret of it.
    """

    members: Annotated[int, Meta(ge=3, le=MAX_MASK_MEMBERS)]
    roster_sha256: Annotated[bytes, Meta(min_length=32, max_length=32)]
    degree: Annotated[int, Meta(ge=2, le=MAX_MASK_DEGREE)]
    threshold: Annotated[int, Meta(ge=2, le=MAX_MASK_DEGREE)]


class HelpedTerms(RingTerms, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Masks of which a helper knows the seeds (clause 15).

    Attributes:
        helper_key_id: of the helper's key that seeds are sealed to; a device has that key from elsewhere.
        life: of the cloud: one that comes back from a backup has another, and may use round numbers again.
    """

    helper_key_id: Annotated[bytes, Meta(min_length=_KEY_ID_BYTES, max_length=_KEY_ID_BYTES)]
    life: Annotated[int, Meta(ge=0, le=2**53)] = 0
