"""A masked cohort in groups, each of which masks by itself: what brokers carry bounds how many devices one can have.

Laws of the file: pure; who is in which group follows from a secret of the run, so that nobody can choose its company;
no message of a group is larger than `MAX_MESSAGE_BYTES`, counted for the longest names in it; the cloud learns the sum
of each group, and a group that cannot be unmasked costs its own updates only. Source: docs/protocol.md, clause 13.12.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from cloud_server.secure.book import MAX_BOOK_BYTES, MaskBook
from cloud_server.secure.layout import Layout, choose_layout
from wire.cbor import decode_canonical, encode_canonical
from wire.errors import MessageError, QuorumError, StorageError, UpdateError
from wire.masking import MAX_MEMBERS, MIN_MEMBERS, MaskGroup
from wire.messages import MaskInbox, MaskKeys, MaskOpened, MaskQuestion, MaskRoster, MaskShares
from wire.primitives import sha256

MAX_MESSAGE_BYTES: Final = 120_000
"""Of a body: hosted brokers end at 128 KiB, and envelope and topic take up to 2 KiB."""
# CBOR of a member (name, key) and of a peer (name, three keys, signature) beside the bytes of the name.
_MEMBER_BYTES: Final = 37
_PEER_BYTES: Final = 172
_BODY_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that mask with each other, and how."""

    devices: tuple[str, ...]
    layout: Layout


def split_cohort(
    devices: Sequence[str],
    seed: bytes,
    *,
    dropout: float,
    colluding: float,
    message_bytes: int = MAX_MESSAGE_BYTES,
) -> list[Group]:
    """The fewest groups of about the same size whose messages a broker carries.

    Args:
        seed: secret; decides who is with whom.
        dropout, colluding: as `choose_layout`; they hold in each group.
        message_bytes: what a broker carries.

    Raises:
        QuorumError: too few devices, or no groups of them that are small enough can mask their updates.
    """
    order = sorted(devices, key=lambda device: sha256(seed + device.encode()))
    count = max(1, -(-len(order) // MAX_MEMBERS))
    while True:
        parts = [tuple(order[place::count]) for place in range(count)]
        if len(parts[-1]) < MIN_MEMBERS <= len(order):
            raise QuorumError(
                "no group of three of these devices has messages that a broker carries", present=len(order)
            )
        groups = [Group(part, choose_layout(len(part), dropout, colluding)) for part in parts]
        if all(roster_bytes(group) <= message_bytes for group in groups):
            return groups
        count += 1


def roster_bytes(group: Group) -> int:
    """The most bytes that a group's roster takes (`MaskRoster`, its largest message)."""
    names = sorted((len(device) for device in group.devices), reverse=True)
    neighbours = names[: min(group.layout.degree, len(names) - 1)]
    members = sum(names) + _MEMBER_BYTES * len(names)
    return members + sum(neighbours) + _PEER_BYTES * len(neighbours) + _BODY_BYTES


class GroupBooks:
    """What the cloud gathers of a masked round, group by group; see `MaskBook`.

    Attributes:
        books: one for each group.
    """

    def __init__(self, groups: Sequence[MaskGroup]) -> None:
        self.books = tuple(MaskBook(group) for group in groups)
        self._of = {device: book for book in self.books for device in book.group.roster.devices}

    def book_of(self, device: str) -> MaskBook:
        """The book of a device's group.

        Raises:
            UpdateError: (peer) it is in none.
        """
        book = self._of.get(device)
        if book is None:
            raise UpdateError("a device that is in no group of the masked round", device=device)
        return book

    def add(self, device: str, body: MaskKeys | MaskShares | MaskOpened) -> None:
        """Takes what a phase asks a device for; raises as the methods of `MaskBook`."""
        book = self.book_of(device)
        if isinstance(body, MaskKeys):
            book.add_keys(device, body)
        elif isinstance(body, MaskShares):
            book.add_shares(device, body)
        else:
            book.add_opened(device, body)

    def roster_for(self, device: str, order_id: bytes) -> MaskRoster:
        """See `MaskBook`."""
        return self.book_of(device).roster_for(device, order_id)

    def inbox_for(self, device: str, order_id: bytes) -> MaskInbox:
        """See `MaskBook`."""
        return self.book_of(device).inbox_for(device, order_id)

    def question_for(self, device: str, order_id: bytes) -> MaskQuestion:
        """See `MaskBook`."""
        return self.book_of(device).question_for(device, order_id)

    def close_keys(self) -> frozenset[str]:
        """See `MaskBook`; of all groups."""
        return frozenset[str]().union(*(book.close_keys() for book in self.books))

    def close_shares(self) -> frozenset[str]:
        """See `MaskBook`; of all groups."""
        return frozenset[str]().union(*(book.close_shares() for book in self.books))

    @property
    def sharers(self) -> frozenset[str]:
        """See `MaskBook`; of all groups."""
        return frozenset[str]().union(*(book.sharers for book in self.books))

    def close_updates(self, delivered: Iterable[str]) -> frozenset[str]:
        """Decides whose updates are summed, and returns who is asked: a group in which too few delivered is not."""
        everybody = frozenset(delivered)
        for book in self.books:
            book.close_updates(everybody.intersection(book.group.roster.devices))
        return frozenset[str]().union(*(book.delivered for book in self.books if not book.is_hopeless))

    @property
    def is_enough(self) -> bool:
        """Whether every group that can be unmasked can be now."""
        return all(book.is_enough or book.is_hopeless for book in self.books)

    def to_bytes(self) -> bytes:
        """See `MaskBook`."""
        return encode_canonical([book.to_bytes() for book in self.books])

    def read(self, data: bytes) -> None:
        """Takes over what `to_bytes` kept.

        Raises:
            StorageError: (disk) it is something else.
        """
        try:
            plain = decode_canonical(data, limit_bytes=len(self.books) * MAX_BOOK_BYTES)
            kept = msgspec.convert(plain, list[bytes], builtin_types=(bytes,))
            for book, each in zip(self.books, kept, strict=True):
                book.read(each)
        except (MessageError, msgspec.ValidationError, ValueError) as error:
            raise StorageError("the book of a masked round is damaged") from error
