"""What the ledger reads off disks and packets: the rows as they lie there, and what a receipt says.

Law of the file: it reads, and judges nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from wire.cose import read_content, read_sign1
from wire.messages import Receipt, decode_body

SOUND = ("stored", "folded", "discarded")
ENDED = ("stored", "refused", "expired", "evicted", "destroyed")
NEAR_ROUNDS = 2
"""Rounds whose replies may still change; older ones are read again when the aggregator starts."""
_LENGTH_BYTES = 4
REPLIES = (
    "SELECT rowid, update_id, order_id, round, device, kind, state, reason, body_sha256 FROM updates"
    " WHERE rowid > ? OR round >= ? ORDER BY rowid"
)
OPEN_BYTES = (
    "SELECT total(length(body) + coalesce(length(sealed), 0)) FROM outbox LEFT JOIN sealings USING (row)"
    " WHERE state = 'open'"
)


@dataclass(frozen=True, slots=True)
class CloudRow:
    """A reply as the aggregator has it."""

    order_id: str
    round_number: int
    device: str
    kind: str
    state: str
    reason: str
    body_sha256: str


def receipt_in(message: bytes) -> Receipt:
    """The body of a receipt; who signed it is the devices' business."""
    end = _LENGTH_BYTES + int.from_bytes(message[:_LENGTH_BYTES], "big")
    head = message[_LENGTH_BYTES:end]
    content = read_content(read_sign1(head, limit_bytes=len(head)).payload)
    return decode_body(content[1], Receipt)
