"""Everything the cloud says: signed by the order key, bound to tenant, fleet, device, type and an expiry.

Laws of the file: every message downward has a fresh (epoch, seq): the epoch is the fencing token that this process
claimed, so no two processes ever share one; content that many devices need is encoded and published once (`bl/`), and
published again only for chunks that a signed bitmap names, each at most once in `REPEAT_SECONDS` and within a budget
of the device that asks and one of the fleet, so that no device can flood the others. Source: docs/protocol.md,
clauses 3, 5 and 7.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from cloud_server.budget import Allowance, Bucket, Buckets
from cloud_server.sender import Sender
from process.clock import Clock
from wire.blobs import make_ref, needed_chunks
from wire.envelope import sign
from wire.errors import ChunkError, PeerError
from wire.header import ALL_DEVICES, Header
from wire.messages import (
    Announcement,
    BlobRef,
    Body,
    Invitation,
    MaskInbox,
    MaskQuestion,
    MaskRoster,
    Need,
    Order,
    Receipt,
    encode_body,
)
from wire.primitives import SigningKey
from wire.topics import Topics
from wire.transport import Packet

KEPT_BLOBS = 4
REPEAT_SECONDS = 1.0
SMALL_BLOB_CHUNKS = 32
"""Budgets are in passes over a blob; one of fewer chunks counts as one of so many."""
DEVICE_BUDGET = Allowance(burst=2.0, per_second=1.0 / 600.0)
FLEET_BUDGET = Allowance(burst=4.0, per_second=1.0 / 10.0)
"""Twice a whole blob for one device at once and once more in ten minutes; for all together four times, and once in ten
seconds. What is repeated for one reaches all, so that those who ask late have most of it by then."""
REMEMBERED_DEVICES = 16_384
REMEMBERED_RECEIPTS = 16_384
RECEIPT_EXPIRY_SECONDS = 3600
CHUNK_EXPIRY_SECONDS = 600


@dataclass(slots=True)
class _Blob:
    ref: BlobRef
    chunks: list[bytes]
    sent_at: dict[int, float] = field(default_factory=dict)


class Downlink:
    """The mouth of the cloud; `cloud_server.rounds.ports.Outbox` is one face of it.

    Args:
        epoch: of this process's messages; must be larger than that of every earlier process.
        chunk_bytes: pieces of a blob; above what the broker accepts nothing arrives.
    """

    def __init__(
        self,
        *,
        topics: Topics,
        key: SigningKey,
        epoch: int,
        sender: Sender,
        clock: Clock,
        chunk_bytes: int = 98_304,
    ) -> None:
        self._topics = topics
        self._key = key
        self._epoch = epoch
        self._seq = 0
        self._sender = sender
        self._clock = clock
        self._chunk_bytes = chunk_bytes
        self._blobs: OrderedDict[bytes, _Blob] = OrderedDict()
        self._answered: OrderedDict[tuple[str, bytes], Receipt] = OrderedDict()
        self._repeats = Buckets(DEVICE_BUDGET, REMEMBERED_DEVICES)
        self._all_repeats = Bucket(FLEET_BUDGET, clock.monotonic())

    def use_key(self, key: SigningKey) -> None:
        """Signs with another key from now on; devices must have been told of it."""
        self._key = key

    @property
    def topics(self) -> Topics:
        """Of the fleet that it speaks to."""
        return self._topics

    # ---- rounds ------------------------------------------------------------------------------------------------

    def publish_blob(self, data: bytes, *, broadcast: bool = True) -> BlobRef:
        """Broadcasts content in chunks and keeps it to answer bitmaps; the same content again is sent once."""
        ref, chunks = make_ref(data, self._chunk_bytes)
        if ref.sha256 not in self._blobs:
            self._blobs[ref.sha256] = _Blob(ref, chunks)
            while len(self._blobs) > KEPT_BLOBS:
                self._blobs.popitem(last=False)
        self._blobs.move_to_end(ref.sha256)
        blob = self._blobs[ref.sha256]
        for index in range(len(blob.chunks)) if broadcast else ():
            if index not in blob.sent_at:
                self._send_chunk(blob, index)
        return ref

    def send_invitation(self, invitation: Invitation) -> None:
        """`rd/now`, retained, so that a device which comes late still finds the round."""
        expiry = int(invitation.deadline) if invitation.open else 0
        self._send(self._topics.invitation(None), ALL_DEVICES, invitation, expiry=expiry, retain=True)

    def send_order(self, device: str, order: Order) -> None:
        self._send(self._topics.by_device("cm", device), device, order, expiry=int(order.deadline))

    def send_masking(self, device: str, body: MaskRoster | MaskInbox | MaskQuestion, deadline: float) -> None:
        """What a device needs for the next phase of a masked round."""
        self._send(self._topics.by_device("cm", device), device, body, expiry=int(deadline))

    # ---- receipts and releases ---------------------------------------------------------------------------------

    def send_receipt(self, device: str, receipt: Receipt) -> None:
        """Tells a device what became of an update; one that was answered is not asked for its chunks again."""
        key = (device, receipt.transfer)
        if receipt.verdict == "missing":
            receipt = self._answered.get(key, receipt)
        else:
            self._answered.pop(key, None)
            self._answered[key] = receipt
            while len(self._answered) > REMEMBERED_RECEIPTS:
                self._answered.popitem(last=False)
        expiry = int(self._clock.now()) + RECEIPT_EXPIRY_SECONDS
        self._send(self._topics.by_device("ak", device), device, receipt, expiry=expiry)

    def announce(self, announcement: Announcement) -> None:
        """`md/{channel}`, retained."""
        self._send(self._topics.announcement(announcement.channel), ALL_DEVICES, announcement, retain=True)

    def answer_need(self, device: str, need: Need) -> None:
        """Publishes again what a device lacks, for all devices, as far as budgets go.

        Raises:
            ChunkError: (peer) a blob that is not on offer, or a bitmap that does not fit it.
            PeerError: (peer) the budget of the device, or of the fleet, is spent (`reason`: budget).
        """
        blob = self._blobs.get(need.sha256)
        if blob is None:
            raise ChunkError("asks for content that is not on offer", sha256=need.sha256.hex())
        now = self._clock.monotonic()
        wanted = needed_chunks(need.bitmap, len(blob.chunks))
        due = [i for i in wanted if now - blob.sent_at.get(i, -REPEAT_SECONDS) >= REPEAT_SECONDS]
        for index in due:
            if index not in blob.sent_at:
                self._send_chunk(blob, index)  # the first time: somebody had to ask
                continue
            self._spend(device, blob, now)
            self._send_chunk(blob, index)

    def _spend(self, device: str, blob: _Blob, now: float) -> None:
        """Charges the repetition of one chunk."""
        cost = 1.0 / max(len(blob.chunks), SMALL_BLOB_CHUNKS)
        buckets = (self._repeats.of(device, now), self._all_repeats)
        # A hair of room, so that a whole number of chunks is not one less by rounding.
        if any(bucket.level(now) < cost * (1.0 - 1e-9) for bucket in buckets):
            raise PeerError("asks for more repetitions than its budget, or the fleet's, has", reason="budget")
        for bucket in buckets:
            bucket.spend(cost)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _send_chunk(self, blob: _Blob, index: int) -> None:
        blob.sent_at[index] = self._clock.monotonic()
        topic = self._topics.blob_chunk(blob.ref.sha256.hex(), index)
        self._sender.send_bulk(Packet(topic, blob.chunks[index], expiry_seconds=CHUNK_EXPIRY_SECONDS))

    def _send(self, topic: str, device: str, body: Body, *, expiry: int = 0, retain: bool = False) -> None:
        header = Header(
            type=body.TYPE,
            direction="down",
            tenant=self._topics.tenant,
            fleet=self._topics.fleet,
            device=device,
            epoch=self._epoch,
            seq=self._seq,
            expiry=expiry,
        )
        self._seq += 1
        message = sign(header, encode_body(body), signer=self._key)
        lifetime = max(1, expiry - int(self._clock.now())) if expiry else None
        self._sender.send(Packet(topic, message, retain=retain, expiry_seconds=lifetime))
