"""The device's part of a masked round: its keys, its shares, its masked update, and what it tells of its neighbours.

Laws of the file: secrets live in memory only and for one order, so that a device which restarts has dropped out; one
vector is ever masked with them; of each neighbour one share is told and never the other; nothing is done for a round
whose roster is smaller than the device's policy wants, or whose keys are not signed by the update keys that the roster
names. A message that comes again is answered with the same bytes. Source: docs/protocol.md, clause 13.
"""

from __future__ import annotations

from collections.abc import Callable

from wire import shamir
from wire.errors import EnvelopeError, MessageError, TrustError
from wire.masking import (
    MIN_MEMBERS,
    SEALED_SHARES_BYTES,
    SECRET_BYTES,
    MaskGroup,
    Roster,
    channel_secret,
    commitment_of,
    context_of,
    keys_statement,
    mask_key_of,
    pair_mask_key,
    self_mask_key,
)
from wire.messages import (
    MaskInbox,
    MaskKeys,
    MaskOpened,
    MaskPeer,
    MaskQuestion,
    MaskRoster,
    MaskShares,
    Order,
)
from wire.primitives import NONCE_BYTES, SEED_BYTES, TAG_BYTES, Aead, AgreementKey, SigningKey, VerifyKey
from wire.ring import RingVector, add_mask, ring_of

# Each key of a channel seals one message.
_NONCE = bytes(NONCE_BYTES)


class DeviceMasking:
    """One device in one masked round.

    Args:
        order: the train order with its terms.
        key: the device's update key, which signs its keys of the round.
        random: gives that many unpredictable bytes.
        min_members: fewest devices that this one hides among.

    Raises:
        MessageError: (peer) terms that would not hide anything.
    """

    def __init__(
        self,
        order: Order,
        *,
        tenant: str,
        fleet: str,
        device: str,
        key: SigningKey,
        random: Callable[[int], bytes],
        min_members: int = MIN_MEMBERS,
    ) -> None:
        if order.masking is None:
            raise MessageError("the order is not one of a masked round")
        self._order, self._terms = order, order.masking
        self._tenant, self._fleet, self._device, self._key = tenant, fleet, device, key
        self._random = random
        _check_terms(order, min_members)
        self.ring = ring_of(self._terms)
        self._context = context_of(tenant, fleet, order.run, order.round_number, self._terms)
        self._mask_seed, self._self_seed = random(SECRET_BYTES), random(SECRET_BYTES)
        self._mask_key = mask_key_of(self._context, self._mask_seed)
        self._channel_key = AgreementKey(random(SEED_BYTES))
        self._group: MaskGroup | None = None
        self._peers: dict[str, MaskPeer] = {}
        self._shares: tuple[MaskRoster, MaskShares] | None = None
        self._inbox: MaskInbox | None = None
        self._held: dict[str, tuple[bytes, bytes]] = {}
        self._sharers: tuple[str, ...] = ()
        self._has_masked = False
        self._opened: tuple[MaskQuestion, MaskOpened] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the device knows with whom it masks its update, and has not done so."""
        return self._inbox is not None and not self._has_masked

    def keys(self) -> MaskKeys:
        """The keys of the round, signed."""
        public = (self._mask_key.public_bytes, self._channel_key.public_bytes)
        commitment = commitment_of(self._context, self._self_seed)
        statement = keys_statement(self._context, self._device, *public, commitment)
        return MaskKeys(
            order_id=self._order.order_id,
            mask_key=public[0],
            channel_key=public[1],
            commitment=commitment,
            signature=self._key.sign(statement),
        )

    def share(self, roster: MaskRoster) -> MaskShares:
        """Checks who takes part, and seals a share of both secrets to each neighbour.

        Raises:
            MessageError: (peer) another roster than the order named, or than the first one; keys that do not belong
            to the neighbours; fewer than the threshold.
            TrustError: (peer) a key that none can agree with.
            EnvelopeError: (peer) a key that its owner did not sign for this round.
        """
        if self._shares is not None:
            if self._shares[0] != roster:
                raise MessageError("a second roster in one masked round")
            return self._shares[1]
        group = self._checked_group(roster)
        peers = {peer.device: peer for peer in roster.peers}
        near = group.neighbours_of(self._device)
        if len(peers) != len(roster.peers) or not set(peers) <= set(near):
            raise MessageError("keys of devices that are no neighbours")
        if len(peers) < self._terms.threshold:
            raise MessageError("too few neighbours sent keys", peers=len(peers))
        public = [key for peer in roster.peers for key in (peer.mask_key, peer.channel_key)]
        own = [self._mask_key.public_bytes, self._channel_key.public_bytes]
        if len({*public, *own}) != len(public) + 2:
            raise MessageError("a key of a masked round is used twice")
        for peer in roster.peers:
            self._verify(group, peer)
        answer = MaskShares(order_id=self._order.order_id, pieces=self._pieces(near, peers))
        self._group, self._peers, self._shares = group, peers, (roster, answer)
        return answer

    def receive(self, inbox: MaskInbox) -> None:
        """Takes what the neighbours sealed for this device: with them, and nobody else, its update is masked.

        A piece that does not open leaves its sender's share unknown here; others hold it too.

        Raises:
            MessageError: (peer) before the shares; another inbox than the first; fewer pieces than the threshold.
        """
        if self._inbox is not None:
            if self._inbox != inbox:
                raise MessageError("a second set of shares in one masked round")
            return
        near = self._joined().neighbours_of(self._device)
        if len(inbox.pieces) != len(near):
            raise MessageError("shares of devices that are no neighbours")
        found = {device: piece for device, piece in zip(near, inbox.pieces, strict=True) if piece}
        if not set(found) <= set(self._peers) or len(found) < self._terms.threshold:
            raise MessageError("too few neighbours shared, or some without keys", sharers=len(found))
        self._held = {
            device: shares for device, piece in found.items() if (shares := self._open(device, piece))
        }
        self._inbox, self._sharers = inbox, tuple(found)

    def mask(self, values: RingVector) -> RingVector:
        """The update under its masks: one by itself, one with each neighbour that shared.

        Args:
            values: of the ring, [P]; not changed.

        Raises:
            MessageError: (us) a second time, or before the shares came.
        """
        if not self.is_ready:
            raise MessageError("a masked round takes one update, after the shares")
        self._has_masked = True
        group, masked = self._joined(), values.copy()
        add_mask(masked, self_mask_key(self._context, self._self_seed))
        for device in self._sharers:
            key = pair_mask_key(self._context, self._mask_key, self._peers[device].mask_key)
            add_mask(masked, key, negative=not group.is_added(self._device, device))
        return masked

    def open(self, question: MaskQuestion) -> MaskOpened:
        """Tells one share of each neighbour: of its own mask's seed if its update came, else of its mask key's.

        Raises:
            MessageError: (peer) before the shares came; another question than the first; fewer neighbours delivered
            than the threshold.
        """
        if self._opened is not None:
            if self._opened[0] != question:
                raise MessageError("a second question in one masked round")
            return self._opened[1]
        if self._inbox is None:
            raise MessageError("a question before the shares")
        near = self._joined().neighbours_of(self._device)
        delivered = _marked(question.delivered, near)
        if not delivered <= set(self._sharers) or len(delivered) < self._terms.threshold:
            raise MessageError(
                "too few neighbours delivered, or some that did not share", delivered=len(delivered)
            )
        pieces = []
        for device in near:
            self_share, key_share = self._held.get(device, (b"", b""))
            pieces.append(self_share if device in delivered else key_share)
        answer = MaskOpened(order_id=self._order.order_id, pieces=tuple(pieces))
        self._opened = (question, answer)
        return answer

    # ---- inside ------------------------------------------------------------------------------------------------

    def _joined(self) -> MaskGroup:
        if self._group is None:
            raise MessageError("a message of a masked round came before its roster")
        return self._group

    def _checked_group(self, roster: MaskRoster) -> MaskGroup:
        members = Roster.read(roster.members)
        if members.sha256 != self._terms.roster_sha256 or len(members.members) != self._terms.members:
            raise MessageError("the roster is not the one that the order named")
        if (self._device, self._key.public_bytes) not in members.members:
            raise MessageError("this device is not in the roster under its own key")
        order = self._order
        return MaskGroup(self._tenant, self._fleet, order.run, order.round_number, self._terms, members)

    def _verify(self, group: MaskGroup, peer: MaskPeer) -> None:
        keys = (peer.mask_key, peer.channel_key, peer.commitment)
        statement = keys_statement(self._context, peer.device, *keys)
        VerifyKey(group.roster.key_of(peer.device)).verify(peer.signature, statement)

    def _pieces(self, near: tuple[str, ...], peers: dict[str, MaskPeer]) -> tuple[bytes, ...]:
        shared = [
            shamir.split(secret, threshold=self._terms.threshold, shares=len(near), random=self._random)
            for secret in (self._self_seed, self._mask_seed)
        ]
        pieces = []
        for device, self_share, key_share in zip(near, *shared, strict=True):
            peer = peers.get(device)
            pieces.append(self._seal(peer, self_share + key_share) if peer is not None else b"")
        return tuple(pieces)

    def _seal(self, peer: MaskPeer, shares: bytes) -> bytes:
        key = channel_secret(self._context, self._channel_key, peer.channel_key, self._device, peer.device)
        sealed = bytearray(len(shares) + TAG_BYTES)
        Aead("A256GCM", key).seal_into(_NONCE, shares, b"", memoryview(sealed))
        return bytes(sealed)

    def _open(self, device: str, piece: bytes) -> tuple[bytes, bytes] | None:
        if len(piece) != SEALED_SHARES_BYTES:
            return None
        opened = bytearray(2 * SECRET_BYTES)
        try:
            public = self._peers[device].channel_key
            key = channel_secret(self._context, self._channel_key, public, device, self._device)
            Aead("A256GCM", key).open_into(_NONCE, memoryview(piece), b"", memoryview(opened))
        except (EnvelopeError, TrustError):
            return None
        return bytes(opened[:SECRET_BYTES]), bytes(opened[SECRET_BYTES:])


def _check_terms(order: Order, min_members: int) -> None:
    """A threshold of more than half: of two different questions to two halves, one finds too few shares."""
    terms = order.masking
    if terms is None or order.kind != "train":
        raise MessageError("only training is masked")
    if terms.members < max(min_members, MIN_MEMBERS):
        raise MessageError("the masked round is smaller than this device wants", members=terms.members)
    degree = min(terms.degree, terms.members - 1)
    if not degree < 2 * terms.threshold <= 2 * degree:
        raise MessageError("the masked round's threshold protects nobody", threshold=terms.threshold)


def _marked(bitmap: bytes, near: tuple[str, ...]) -> set[str]:
    marked = {device for place, device in enumerate(near) if _bit(bitmap, place)}
    if len(bitmap) != -(-len(near) // 8) or sum(byte.bit_count() for byte in bitmap) != len(marked):
        raise MessageError("a question about devices that are no neighbours")
    return marked


def _bit(bitmap: bytes, place: int) -> bool:
    return place // 8 < len(bitmap) and bool(bitmap[place // 8] >> place % 8 & 1)
