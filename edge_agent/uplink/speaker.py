"""What a device says and hears: bodies become signed or sealed packets, packets become verified bodies.

Laws of the file: only the birth and the request for chunks travel clear (signed); everything else a device
says is sealed to the cloud's current key and padded; nothing is believed before its signature, addressee,
type, freshness and place in the replay window were checked; (epoch, seq) is reserved on disk before it is
used. Source: docs/protocol.md, clauses 2 to 5 and 9; laws 4 and 9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from edge_agent.enrolment.identity import Identity
from edge_agent.store.at_rest import content_algorithm_here
from edge_agent.uplink.online_keys import OnlineKeys
from process.clock import Clock
from wire import envelope
from wire.chunks import chunk_count, max_payload_bytes, split
from wire.errors import MessageError, ReplayError, TrustError
from wire.header import Header
from wire.helper import MaskSeed
from wire.messages import (
    Announcement,
    Birth,
    Body,
    InferenceReport,
    Invitation,
    Join,
    MaskInbox,
    MaskKeys,
    MaskOpened,
    MaskQuestion,
    MaskRoster,
    MaskShares,
    Need,
    Order,
    Receipt,
    Telemetry,
    decode_body,
    encode_body,
)
from wire.primitives import ContentAlgorithm, KemPublicKey, VerifyKey
from wire.told_clock import clock_extension
from wire.topics import Topics, message_types
from wire.transport import Packet

SHARD: Final = "0"
ASKED_FROM_CHUNKS: Final = 4
MAX_DOWN_BYTES: Final = 256 * 1024
NEED_EXPIRY_SECONDS: Final = 60
TELEMETRY_EXPIRY_SECONDS: Final = 60
REPORT_EXPIRY_SECONDS: Final = 300

DownBody = Invitation | Order | Receipt | Announcement | MaskRoster | MaskInbox | MaskQuestion
_DOWN: Final[dict[str, type[DownBody]]] = {
    body.TYPE: body
    for body in (Invitation, Order, Receipt, Announcement, MaskRoster, MaskInbox, MaskQuestion)
}
_DOWN_TOPICS: Final = frozenset({"rd", "cm", "ak", "md"})
# The broker hands the retained ones out again at every connection; acting on them twice changes nothing.
_RETAINED: Final = frozenset({Invitation.TYPE, Announcement.TYPE})


class Numbers(Protocol):
    """Where a device's numbers come from; `sequence.Sequence` reserves them on its disk."""

    def next(self) -> tuple[int, int]:
        """(epoch, seq), which never came before.

        Raises:
            StorageError: nothing may be sent.
        """
        ...


class Windows(Protocol):
    """What of the cloud's messages was heard; `orders.ReplayWindows` keeps it on the disk."""

    def accept(self, kind: str, epoch: int, seq: int) -> None:
        """Lets a message in once.

        Raises:
            ReplayError: (peer) seen before, or too old to tell.
        """
        ...


@dataclass(frozen=True, slots=True)
class BlobChunk:
    """A piece of a blob, not verified yet: the blob's reference decides."""

    sha256: bytes
    index: int
    piece: bytes


def last_chunk(sealed: bytes, max_packet_bytes: int) -> tuple[int, ...]:
    """What is sent of a message that may have arrived in part: its last chunk, whose receipt names those that are
    missing; empty (all of it) for a message of few chunks."""
    total = chunk_count(len(sealed), max_payload_bytes(max_packet_bytes))
    return (total - 1,) if total >= ASKED_FROM_CHUNKS else ()


class Speaker:
    """One device's voice and ears.

    Attributes:
        heard_epoch: of the cloud's message that was heard last; 0 before the first.
        acknowledged_until: when the newest receipt that was heard ends (unix seconds); 0 before the first.

    Args:
        clock: decides whether a message has expired; give it the floored one.
        machine_now: the machine's own clock (unix seconds), which heartbeats tell; None: they do not.
        content_algorithm: what sealed content is encrypted with (None: what this machine is faster with). The cloud
            opens both.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        sequence: Numbers,
        windows: Windows,
        clock: Clock,
        machine_now: Callable[[], float] | None = None,
        content_algorithm: ContentAlgorithm | None = None,
    ) -> None:
        self._identity = identity
        self._sequence = sequence
        self._windows = windows
        self._clock = clock
        self._machine_now = machine_now
        self._content_algorithm = content_algorithm or content_algorithm_here()
        self._topics = Topics(identity.tenant, identity.fleet)
        self._recipient: KemPublicKey | None = None
        self._signers: dict[bytes, envelope.Signer] = {}
        self.acknowledged_until = 0.0
        self.heard_epoch = 0
        self.keys = OnlineKeys.of_enrolment(identity)
        self.trust(self.keys)

    @property
    def filters(self) -> tuple[tuple[str, int], ...]:
        """What the device subscribes to, with QoS."""
        wanted = self._topics.device_filters(self._identity.device, self._identity.channel)
        return tuple((topic_filter, 1) for topic_filter in wanted)

    @property
    def bulk_filters(self) -> tuple[str, ...]:
        """Those that a link with limits does without while it is shut: rounds, and what is broadcast for them."""
        return (self._topics.invitation(None), self._topics.blob_filter)

    @property
    def kem_key_id(self) -> bytes:
        """The key that updates are sealed to now; empty without one."""
        return self._recipient.key_id if self._recipient is not None else b""

    @property
    def kem_key_ids(self) -> frozenset[bytes]:
        """All keys that the cloud lists to be sealed to: it opens what was sealed to any of them."""
        return frozenset(name for name, _, _ in self.keys.kem)

    def trust(self, keys: OnlineKeys) -> None:
        """Takes over the cloud's online keys: those of enrolment, later what TUF vouches for.

        Raises:
            TrustError: (peer) a key is not one, there is none, or they are another fleet's.
        """
        if (keys.tenant, keys.fleet) != (self._identity.tenant, self._identity.fleet):
            raise TrustError(f"the online keys are those of {keys.tenant}/{keys.fleet}")
        recipients = [KemPublicKey(algorithm, public) for _, algorithm, public in keys.kem]
        signers = [VerifyKey(public) for _, public in keys.orders]
        if not recipients or not signers:
            raise TrustError("the cloud lists no key for orders, or none to seal to")
        self.keys = keys
        self._recipient = recipients[0]
        self._signers = {key.key_id: envelope.Signer("", key) for key in signers}

    # --- up ---------------------------------------------------------------------------------------------

    def birth(self, body: Birth) -> Packet:
        """The retained presence message; also the last will and the last words."""
        topic = self._topics.by_device(Birth.TYPE, self._identity.device)
        return Packet(topic, self._sign(body), qos=1, retain=True)

    def need(self, body: Need) -> Packet:
        """The request for the missing chunks of a blob."""
        topic = self._topics.need(self._identity.device, body.sha256.hex())
        return Packet(topic, self._sign(body), qos=1, expiry_seconds=NEED_EXPIRY_SECONDS)

    def join(self, body: Join, *, run: str, round_number: int) -> Packet:
        """The answer to an order."""
        sealed = self._seal(body.TYPE, encode_body(body), run=run, round_number=round_number)
        return Packet(self._topics.by_device(body.TYPE, self._identity.device), sealed, qos=1)

    def masking(self, body: MaskKeys | MaskShares | MaskOpened, *, run: str, round_number: int) -> Packet:
        """What a phase of a masked round asks for."""
        sealed = self._seal(body.TYPE, encode_body(body), run=run, round_number=round_number)
        return Packet(self._topics.by_device("jn", self._identity.device), sealed, qos=1)

    def quick(self, body: Telemetry | InferenceReport) -> Packet:
        """A report that may be lost."""
        expiry = TELEMETRY_EXPIRY_SECONDS if isinstance(body, Telemetry) else REPORT_EXPIRY_SECONDS
        extensions = None
        if isinstance(body, Telemetry) and self._machine_now is not None:
            extensions = clock_extension(self._machine_now())
        sealed = self._seal(body.TYPE, encode_body(body), extensions=extensions)
        topic = self._topics.by_device(body.TYPE, self._identity.device)
        return Packet(topic, sealed, qos=0, expiry_seconds=expiry)

    def seal_update(self, kind: str, body: bytes, *, run: str, round_number: int, base: bytes) -> bytes:
        """Seals an update or evaluation (encoded) for the outbox; the same bytes are sent until a receipt."""
        return self._seal(kind, body, run=run, round_number=round_number, base=base)

    def seal_seed(self, body: MaskSeed, helper: KemPublicKey, *, run: str, round_number: int) -> bytes:
        """Seals the seed of a mask, in the device's name, to the helper and nobody else (clause 15)."""
        return envelope.seal(
            self._header(body.TYPE, run, round_number),
            encode_body(body),
            signer=self._identity.update_key,
            recipient=helper,
            content_algorithm=self._content_algorithm,
            pad=True,
        )

    def uploads(
        self,
        sealed: bytes,
        round_number: int,
        *,
        max_packet_bytes: int,
        parts: Iterable[int] = (),
        expiry_seconds: int | None = None,
    ) -> list[Packet]:
        """The packets of a sealed message: all of them, or those with the indices `parts`."""
        chunks = split(sealed, max_payload_bytes(max_packet_bytes))
        wanted = [part for part in parts if part < len(chunks)] or range(len(chunks))
        return [
            Packet(
                self._topics.upload(SHARD, self._identity.device, round_number, index),
                chunks[index],
                qos=1,
                expiry_seconds=expiry_seconds,
            )
            for index in wanted
        ]

    def _header(self, kind: str, run: str = "", round_number: int = 0, base: bytes = b"") -> Header:
        epoch, seq = self._sequence.next()
        return Header(
            type=kind,
            direction="up",
            tenant=self._identity.tenant,
            fleet=self._identity.fleet,
            device=self._identity.device,
            epoch=epoch,
            seq=seq,
            run=run,
            round_number=round_number,
            base=base,
        )

    def _sign(self, body: Body) -> bytes:
        return envelope.sign(self._header(body.TYPE), encode_body(body), signer=self._identity.update_key)

    def _seal(
        self,
        kind: str,
        body: bytes,
        *,
        run: str = "",
        round_number: int = 0,
        base: bytes = b"",
        extensions: Mapping[int, bytes] | None = None,
    ) -> bytes:
        if self._recipient is None:
            raise TrustError("there is no key to seal to")
        header = self._header(kind, run, round_number, base)
        return envelope.seal(
            header,
            body,
            signer=self._identity.update_key,
            recipient=self._recipient,
            content_algorithm=self._content_algorithm,
            extensions=extensions,
            pad=True,
        )

    # --- down -------------------------------------------------------------------------------------------

    def hear_chunk(self, packet: Packet) -> BlobChunk | None:
        """The packet as a piece of a blob, or None when it is a message.

        Raises:
            MessageError: (peer) not a topic of this fleet.
        """
        topic = self._topics.parse(packet.topic)
        if topic.kind != "bl":
            return None
        return BlobChunk(bytes.fromhex(topic.sha256), topic.chunk, packet.payload)

    def hear(self, packet: Packet) -> DownBody:
        """Verifies a message and moves the replay window; call it in the transaction that stores its effect.

        Raises:
            EnvelopeError: (peer) it does not open; `reason` is `signer` when its key is unknown.
            MessageError: (peer) a topic or body that is none of ours.
            ReplayError: (peer) seen before, or too old to tell.
        """
        topic = self._topics.parse(packet.topic)
        if topic.kind not in _DOWN_TOPICS or (topic.device and topic.device != self._identity.device):
            raise MessageError("a topic that is not for this device", topic=packet.topic[:200])
        expect = envelope.Expect(
            direction="down",
            tenant=self._identity.tenant,
            fleet=self._identity.fleet,
            type=message_types(topic.kind),
            device=self._identity.device,
        )
        opened = envelope.open_signed(
            packet.payload,
            signers=self._signers,
            expect=expect,
            now=self._clock.now(),
            limit_bytes=MAX_DOWN_BYTES,
        )
        kind = opened.header.type
        body = decode_body(opened.body, _DOWN[kind], limit_bytes=MAX_DOWN_BYTES)
        self._move_window(kind, opened.header)
        self.heard_epoch = opened.header.epoch
        if topic.kind == Receipt.TYPE:
            self.acknowledged_until = float(opened.header.expiry)
        return body

    def _move_window(self, kind: str, header: Header) -> None:
        try:
            self._windows.accept(kind, header.epoch, header.seq)
        except ReplayError as error:
            if kind in _RETAINED and error.facts.get("reason") == "seen":
                return
            raise
