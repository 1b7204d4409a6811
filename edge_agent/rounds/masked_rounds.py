"""The masked rounds that a device is in: one set of secrets for each order, and the update that waits for its masks.

Laws of the file: an update leaves here under its masks or not at all; secrets and drafts are in memory only; at most
`MAX_ROUNDS` are kept, the oldest go first. Source: docs/protocol.md, clauses 13 (masks that devices agree on) and 15
(masks that a helper takes away).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edge_agent.enrolment.identity import Identity
from edge_agent.rounds.helped_round import HelpedMasking, SealSeed
from edge_agent.rounds.masking import DeviceMasking
from wire.errors import MessageError
from wire.messages import (
    MaskInbox,
    MaskKeys,
    MaskOpened,
    MaskQuestion,
    MaskRoster,
    MaskShares,
    Order,
    Update,
)
from wire.primitives import KemPublicKey
from wire.ring import RingVector

MAX_ROUNDS: Final = 4

MaskMessage = MaskRoster | MaskInbox | MaskQuestion


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """An update whose numbers are not masked yet. It has no encoding, so that it cannot be sent by mistake.

    Attributes:
        values: of the order's ring, [P].
        steps: optimizer steps behind it, for the device's own count.
    """

    update_id: bytes
    order: Order
    values: RingVector
    steps: int


@dataclass(slots=True)
class _Round:
    order: Order
    masking: DeviceMasking | HelpedMasking
    draft: Draft | None = None


class MaskedRounds:
    """The masked rounds of one device. Used from the agent's loop only.

    Args:
        random: gives that many unpredictable bytes.
        min_members: fewest devices that this one hides among.
        helper: the key that this device knows its helper by, or None.
        seal: seals a seed to it.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        random: Callable[[int], bytes],
        min_members: int,
        helper: Callable[[], KemPublicKey | None],
        seal: SealSeed,
    ) -> None:
        self._identity = identity
        self._random = random
        self._min_members = min_members
        self._helper = helper
        self._seal = seal
        self._rounds: OrderedDict[bytes, _Round] = OrderedDict()

    def order_of(self, order_id: bytes) -> Order | None:
        """The order of a round that the device is in."""
        found = self._rounds.get(order_id)
        return None if found is None else found.order

    def begin(self, order: Order) -> MaskKeys | None:
        """The keys for an order, the same whenever they are asked for; None where a helper needs none of them.

        Raises:
            MessageError: (peer) terms that would not hide anything.
        """
        found = self._rounds.get(order.order_id)
        if found is None:
            found = self._rounds[order.order_id] = _Round(order, self._masking_of(order))
            while len(self._rounds) > MAX_ROUNDS:
                self._rounds.popitem(last=False)
        return found.masking.keys() if isinstance(found.masking, DeviceMasking) else None

    def _masking_of(self, order: Order) -> DeviceMasking | HelpedMasking:
        identity = self._identity
        if order.helped is not None:
            return HelpedMasking(
                order,
                tenant=identity.tenant,
                fleet=identity.fleet,
                helper=self._helper,
                random=self._random,
                min_devices=self._min_members,
                seal=self._seal,
            )
        return DeviceMasking(
            order,
            tenant=identity.tenant,
            fleet=identity.fleet,
            device=identity.device,
            key=identity.update_key,
            random=self._random,
            min_members=self._min_members,
        )

    def hear(self, body: MaskMessage) -> MaskShares | MaskOpened | None:
        """What a message of a masked round is answered with; None for the one that is not answered.

        Raises:
            MessageError: (peer) the device is not in this round, or the message does not fit it.
            TrustError: (peer) a key that none can agree with.
            EnvelopeError: (peer) a key that its owner did not sign for this round.
        """
        masking = self._round(body.order_id).masking
        if not isinstance(masking, DeviceMasking):
            raise MessageError("a round with a helper has no such message")
        if isinstance(body, MaskRoster):
            return masking.share(body)
        if isinstance(body, MaskQuestion):
            return masking.open(body)
        masking.receive(body)
        return None

    def hold(self, draft: Draft) -> None:
        """Keeps an update until its masks are known; a round that the device is no longer in has no use for it."""
        found = self._rounds.get(draft.order.order_id)
        if found is not None:
            found.draft = draft

    def finish(self, order_id: bytes) -> Update | None:
        """The update under its masks, once; None while the shares are not here, or there is no update.

        Raises:
            MessageError: (us) the device is not in this round.
        """
        found = self._round(order_id)
        draft, order = found.draft, found.order
        if draft is None or not found.masking.is_ready:
            return None
        found.draft = None
        masking = found.masking
        if isinstance(masking, HelpedMasking):
            masked, sealed_seed = masking.mask(draft.values)
        else:
            masked, sealed_seed = masking.mask(draft.values), b""
        return Update(
            update_id=draft.update_id,
            order_id=order_id,
            run=order.run,
            round_number=order.round_number,
            base_sha256=order.head_sha256,
            num_examples=1,
            codec=masking.ring.name,
            params_size=len(draft.values),
            payload=masked.tobytes(),
            sealed_seed=sealed_seed,
        )

    def drop(self, order_id: bytes) -> None:
        """Forgets a round's secrets."""
        self._rounds.pop(order_id, None)

    def _round(self, order_id: bytes) -> _Round:
        found = self._rounds.get(order_id)
        if found is None:
            raise MessageError("this device is not in that masked round")
        return found
