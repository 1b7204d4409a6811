"""The device's part of a round that a helper unmasks: one mask, and its seed sealed to the helper.

Laws of the file: the seed is fresh for every order, in memory only, and masks one vector; it is sealed to a key that
this device did not get from the aggregator, and to nothing else; nothing is masked for a helper that it does not know.
Source: docs/protocol.md, clause 15.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from wire.errors import MessageError
from wire.helper import SEED_BYTES, MaskSeed, helped_context, helped_mask_key
from wire.messages import Order
from wire.primitives import KemPublicKey
from wire.ring import RingVector, add_mask, ring_of


class SealSeed(Protocol):
    """Seals a seed to a helper, signed by the device, for one round."""

    def __call__(self, body: MaskSeed, helper: KemPublicKey, *, run: str, round_number: int) -> bytes: ...


class HelpedMasking:
    """One device in one round that a helper unmasks.

    Args:
        order: the train order with its terms.
        helper: the key that this device knows its helper by now; None while it knows none.
        random: gives that many unpredictable bytes.
        min_devices: the device takes part in no sum of fewer; the helper sees to it.

    Raises:
        MessageError: (peer) terms that cannot be used.
    """

    def __init__(
        self,
        order: Order,
        *,
        tenant: str,
        fleet: str,
        helper: Callable[[], KemPublicKey | None],
        random: Callable[[int], bytes],
        min_devices: int,
        seal: SealSeed,
    ) -> None:
        terms = order.helped
        if terms is None or order.masking is not None or order.kind != "train":
            raise MessageError("the order is not one of a round with a helper")
        self.ring = ring_of(terms)
        self._key_id = terms.helper_key_id
        # Noise is made for so many: the helper tells the sum of no fewer.
        least = min_devices if terms.noise is None else max(min_devices, terms.noise.quorum)
        self._order, self._helper, self._min_devices, self._seal = order, helper, least, seal
        self._context = helped_context(tenant, fleet, order.run, order.round_number, terms)
        self._seed = random(SEED_BYTES)

    @property
    def is_ready(self) -> bool:
        """Whether an update can be masked: once, and as soon as the device knows the helper that the order names."""
        return bool(self._seed) and self._known() is not None

    def mask(self, values: RingVector) -> tuple[RingVector, bytes]:
        """The update under its mask, and the mask's seed as only the helper can read it.

        Args:
            values: of the ring, [P]; not changed.

        Raises:
            MessageError: (us) a second time, or before the helper is known.
            TrustError: nothing can be sealed to the helper's key.
        """
        helper = self._known()
        if not self._seed or helper is None:
            raise MessageError("a seed masks one update, for a helper that is known")
        seed, self._seed = self._seed, b""
        body = MaskSeed(
            context=self._context, seed=seed, params_size=len(values), min_devices=self._min_devices
        )
        order = self._order
        sealed = self._seal(body, helper, run=order.run, round_number=order.round_number)
        masked = values.copy()
        add_mask(masked, helped_mask_key(self._context, seed))
        return masked, sealed

    def _known(self) -> KemPublicKey | None:
        helper = self._helper()
        return helper if helper is not None and helper.key_id == self._key_id else None
