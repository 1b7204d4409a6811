"""What the cloud gathers of one masked round: keys, sealed shares, and the shares that are told at the end.

Laws of the file: pure, no I/O; what a device sends counts once, a repetition is the same or refused; a key that its
owner did not sign for this round, or that two devices send, counts for nobody; only members of the roster are heard;
the cloud sees sealed shares and never opens them. `to_bytes` is everything, so a restart can go on. Source:
docs/protocol.md, clause 13.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from wire.cbor import decode_canonical, encode_canonical
from wire.errors import EnvelopeError, MessageError, RoundError, StorageError, TrustError, UpdateError
from wire.masking import SEALED_SHARES_BYTES, MaskGroup, keys_statement
from wire.messages import (
    MaskInbox,
    MaskKeys,
    MaskMember,
    MaskOpened,
    MaskPeer,
    MaskQuestion,
    MaskRoster,
    MaskShares,
    decode_body,
    encode_body,
)
from wire.primitives import AgreementKey, VerifyKey

MAX_BOOK_BYTES = 64 * 1024 * 1024
_TRIAL = AgreementKey(bytes(range(32)))


class MaskBook:
    """One masked round.

    Attributes:
        keys: of the devices that announced theirs.
        shares: of those that shared.
        opened: of those that answered the question.
        sharers: who masks with whom, once `close_shares` has decided it; empty before.
        delivered: whose updates are summed, once `close_updates` has decided it; empty before.
    """

    def __init__(self, group: MaskGroup) -> None:
        self.group = group
        self.keys: dict[str, MaskKeys] = {}
        self.shares: dict[str, MaskShares] = {}
        self.opened: dict[str, MaskOpened] = {}
        self.sharers: frozenset[str] = frozenset()
        self.delivered: frozenset[str] = frozenset()
        self._told: Counter[str] = Counter()

    # ---- what devices send -------------------------------------------------------------------------------------

    def add_keys(self, device: str, body: MaskKeys) -> None:
        """Takes a device's keys of the round.

        Raises:
            UpdateError: (peer) not a member, not signed by it for this round, or a key that was sent before.
        """
        if self._is_repeated(self.keys.get(device), body):
            return
        self._member(device)
        statement = keys_statement(
            self.group.context, device, body.mask_key, body.channel_key, body.commitment
        )
        try:
            VerifyKey(self.group.roster.key_of(device)).verify(body.signature, statement)
            for key in (body.mask_key, body.channel_key):
                # One that makes every secret the same would cost the neighbours their round.
                _TRIAL.agree(key)
        except (EnvelopeError, TrustError) as error:
            raise UpdateError("keys of a masked round cannot be used", device=device) from error
        used = {key for each in self.keys.values() for key in (each.mask_key, each.channel_key)}
        if {body.mask_key, body.channel_key} & used or body.mask_key == body.channel_key:
            raise UpdateError("a key of a masked round is used twice", device=device)
        self.keys[device] = body

    def add_shares(self, device: str, body: MaskShares) -> None:
        """Takes what a device sealed to its neighbours.

        Raises:
            UpdateError: (peer) not a member with keys, or not one piece for each neighbour with keys.
        """
        if self._is_repeated(self.shares.get(device), body):
            return
        self._member(device)
        near = self.group.neighbours_of(device)
        if device not in self.keys or len(body.pieces) != len(near):
            raise UpdateError("shares of a masked round do not fit it", device=device)
        for neighbour, piece in zip(near, body.pieces, strict=True):
            if len(piece) != (SEALED_SHARES_BYTES if neighbour in self.keys else 0):
                raise UpdateError("shares of a masked round do not fit it", device=device)
        self.shares[device] = body

    def add_opened(self, device: str, body: MaskOpened) -> None:
        """Takes a device's answer to the question.

        Raises:
            UpdateError: (peer) not a device that was asked, or not one piece for each neighbour.
        """
        if self._is_repeated(self.opened.get(device), body):
            return
        self._member(device)
        if device not in self.delivered or len(body.pieces) != len(self.group.neighbours_of(device)):
            raise UpdateError("an answer of a masked round does not fit it", device=device)
        self.opened[device] = body
        near = self.group.neighbours_of(device)
        self._told.update(name for name, piece in zip(near, body.pieces, strict=True) if piece)

    # ---- what the cloud sends ----------------------------------------------------------------------------------

    def roster_for(self, device: str, order_id: bytes) -> MaskRoster:
        """All members, and the keys of the device's neighbours."""
        members = tuple(MaskMember(name, key) for name, key in self.group.roster.members)
        found = [(name, self.keys[name]) for name in self.group.neighbours_of(device) if name in self.keys]
        peers = tuple(
            MaskPeer(name, keys.mask_key, keys.channel_key, keys.commitment, keys.signature)
            for name, keys in found
        )
        return MaskRoster(order_id=order_id, members=members, peers=peers)

    def inbox_for(self, device: str, order_id: bytes) -> MaskInbox:
        """What each neighbour that masks sealed to the device."""
        pieces = []
        for neighbour in self.group.neighbours_of(device):
            if neighbour in self.sharers:
                pieces.append(self.shares[neighbour].pieces[self.group.place_of(neighbour, device)])
            else:
                pieces.append(b"")
        return MaskInbox(order_id=order_id, pieces=tuple(pieces))

    def question_for(self, device: str, order_id: bytes) -> MaskQuestion:
        """Which of the device's neighbours delivered."""
        near = self.group.neighbours_of(device)
        bitmap = bytearray(-(-len(near) // 8))
        for place, neighbour in enumerate(near):
            if neighbour in self.delivered:
                bitmap[place // 8] |= 1 << place % 8
        return MaskQuestion(order_id=order_id, delivered=bytes(bitmap))

    # ---- the turns of the round --------------------------------------------------------------------------------

    def close_keys(self) -> frozenset[str]:
        """Who goes on after the keys: members with enough neighbours that announced theirs."""
        return self._with_enough(self.keys)

    def close_shares(self) -> frozenset[str]:
        """Decides who masks: members that shared and have enough neighbours that did."""
        self.sharers = self._with_enough(self.shares)
        return self.sharers

    def close_updates(self, delivered: Iterable[str]) -> frozenset[str]:
        """Decides whose updates are summed.

        Raises:
            RoundError: an update of a device that does not mask.
        """
        self.delivered = frozenset(delivered)
        if not self.delivered <= self.sharers:
            raise RoundError("a masked update of a device that did not share")
        return self.delivered

    @property
    def lost(self) -> frozenset[str]:
        """Devices that masked with a neighbour which delivered, and did not deliver themselves."""
        near = {other for device in self.delivered for other in self.group.neighbours_of(device)}
        return (self.sharers - self.delivered) & near

    @property
    def is_enough(self) -> bool:
        """Whether as many shares were told of each secret that is needed as give it back."""
        threshold = self.group.terms.threshold
        return all(self._told[device] >= threshold for device in self.delivered | self.lost)

    @property
    def is_hopeless(self) -> bool:
        """Whether of some secret that is needed fewer shares are with devices that delivered than give it back; or
        fewer delivered than the noise was made for."""
        group, threshold, noise = self.group, self.group.terms.threshold, self.group.terms.noise
        if noise is not None and len(self.delivered) < noise.quorum:
            # Never asked about: the noise of so few would not hide what one of them says.
            return True
        needed = self.delivered | self.lost
        return any(len(self.delivered.intersection(group.neighbours_of(d))) < threshold for d in needed)

    # ---- on disk -----------------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """Everything but the group, which follows from the round's row."""
        parts = {
            name: {device: encode_body(body) for device, body in found.items()}
            for name, found in (("keys", self.keys), ("shares", self.shares))
        }
        return encode_canonical({**parts, "sharers": sorted(self.sharers)})

    def read(self, data: bytes) -> None:
        """Takes over what `to_bytes` kept.

        Raises:
            StorageError: (disk) it is something else.
        """
        try:
            kept = decode_canonical(data, limit_bytes=MAX_BOOK_BYTES)
            self.keys = {device: decode_body(body, MaskKeys) for device, body in kept["keys"].items()}
            self.shares = {device: decode_body(body, MaskShares) for device, body in kept["shares"].items()}
            self.sharers = frozenset(kept["sharers"])
        except (MessageError, msgspec.ValidationError, KeyError, AttributeError, TypeError) as error:
            raise StorageError("the book of a masked round is damaged") from error

    # ---- inside ------------------------------------------------------------------------------------------------

    def _member(self, device: str) -> None:
        if device not in self.group.roster.places:
            raise UpdateError("a device that is not in the roster of the masked round", device=device)

    def _is_repeated(self, known: object | None, body: object) -> bool:
        if known is not None and known != body:
            raise UpdateError("a device said two different things in a masked round")
        return known is not None

    def _with_enough(self, found: Mapping[str, object]) -> frozenset[str]:
        """Without those that cannot be unmasked: leaving one out may leave another with too few."""
        left, threshold = set(found), self.group.terms.threshold
        while True:
            short = {d for d in left if len(left.intersection(self.group.neighbours_of(d))) < threshold}
            if not short:
                return frozenset(left)
            left -= short
