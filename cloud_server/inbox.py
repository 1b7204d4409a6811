"""Everything that comes up: from packets of an untrusted broker to opened bodies of enrolled devices.

Laws of the file: nothing is believed before its signature verified against the registry and its topic agreed with its
header; a device's reassembly has a byte cap before anything is allocated; whatever arrives, the aggregator goes on: a
message that cannot be used is counted under its reason, logged once per sender, and dropped. Updates keep their replay
window in the database (the receiver of `on_update` moves it with the row); everything else here is idempotent and keeps
its window in memory. Source: docs/protocol.md, clauses 5, 6 and 9.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

from cloud_server.partials import Partials
from process.clock import Clock
from process.logs import get_logger
from wire.chunks import Chunk, Reassembly, parse
from wire.envelope import Expect, Opened, Signer, open_sealed, open_signed
from wire.errors import ChunkError, MessageError, PeerError, ReplayError
from wire.messages import (
    Birth,
    InferenceReport,
    Join,
    MaskKeys,
    MaskOpened,
    MaskShares,
    Need,
    Receipt,
    Telemetry,
    decode_body,
)
from wire.primitives import KemPrivateKey
from wire.replay import Window
from wire.told_clock import told_clock
from wire.topics import Topic, Topics, message_types
from wire.transport import Packet

OPEN_SENDERS = 16_384
ASSEMBLY_BYTES = 1024 * 1024 * 1024
"""Bytes of updates that are gathered at once, of all devices together."""
SMALL_MESSAGE_BYTES = 64 * 1024
_UPDATE_TYPES = frozenset({"up", "ev"})
_ZERO_ID = bytes(16)
_MASKING: dict[str, type[MaskKeys | MaskShares | MaskOpened]] = {
    body.TYPE: body for body in (MaskKeys, MaskShares, MaskOpened)
}

_log = get_logger("cloud.inbox")


class Receiver(Protocol):
    """What opened messages are for. Every method returns soon."""

    def on_birth(self, device: str, birth: Birth) -> None: ...

    def on_telemetry(self, device: str, telemetry: Telemetry) -> None: ...

    def on_clock(self, device: str, told: float) -> None:
        """A heartbeat said what time it is there (unix seconds)."""

    def on_inference_report(self, device: str, report: InferenceReport) -> None: ...

    def on_join(self, device: str, join: Join) -> None: ...

    def on_need(self, device: str, need: Need) -> None: ...

    def on_masking(self, device: str, body: MaskKeys | MaskShares | MaskOpened) -> None: ...

    def on_update(self, device: str, opened: Opened, transfer: bytes, size_bytes: int) -> None: ...

    def is_answered(self, device: str, transfer: bytes) -> bool:
        """Whether this transfer of a device has its receipt."""
        ...

    def on_repeated(self, device: str, transfer: bytes) -> None:
        """A transfer that has its receipt is offered again."""

    def on_missing(self, device: str, receipt: Receipt) -> None: ...


class Inbox:
    """Opens packets and hands them on.

    Args:
        signers: gives the registry's current key id → signer mapping; revoked devices are not in it.
        is_known: whether a device is enrolled and not revoked.
        slot_bytes: largest sealed update that a device may send.

    Attributes:
        refused_total: dropped messages by reason.
        received_bytes_total: payload bytes, dropped ones too.
    """

    def __init__(
        self,
        *,
        topics: Topics,
        signers: Callable[[], Mapping[bytes, Signer]],
        is_known: Callable[[str], bool],
        kem_keys: Mapping[bytes, KemPrivateKey],
        receiver: Receiver,
        clock: Clock,
        slot_bytes: int,
    ) -> None:
        self._topics = topics
        self._signers = signers
        self._is_known = is_known
        self._kem_keys = kem_keys
        self._receiver = receiver
        self._clock = clock
        self._slot_bytes = slot_bytes
        self._windows: OrderedDict[tuple[str, str], Window] = OrderedDict()
        self._reassemblies: OrderedDict[str, Reassembly] = OrderedDict()
        self._granted_bytes = 0
        self._partials: Partials | None = None
        self._logged: OrderedDict[tuple[str, str], None] = OrderedDict()
        self.refused_total: Counter[str] = Counter()
        self.received_bytes_total = 0

    @property
    def open_transfers(self) -> int:
        """Devices whose updates are being gathered."""
        return len(self._reassemblies)

    @property
    def granted_bytes(self) -> int:
        """Bytes that those updates will have; `ASSEMBLY_BYTES` at most."""
        return self._granted_bytes

    def use_keys(self, kem_keys: Mapping[bytes, KemPrivateKey]) -> None:
        """Opens what is sealed to these keys from now on."""
        self._kem_keys = kem_keys

    def keep_partials(self, partials: Partials) -> None:
        """Keeps the chunks of large updates there, and goes on with those that came before a restart."""
        self._partials = partials

    def receive(self, packet: Packet) -> None:
        """Takes one packet; never raises for what is in it."""
        self.received_bytes_total += len(packet.payload)
        try:
            topic = self._topics.parse(packet.topic)
        except MessageError as error:
            self._refuse("", "topic", error)
            return
        if not packet.payload:
            return  # a retained message that was cleared
        try:
            self._HANDLERS[topic.kind](self, topic, packet.payload)
        except KeyError:
            self._refuse(topic.device, f"no upward topic {topic.kind}", None)
        except PeerError as error:
            self._refuse(
                topic.device, f"{topic.kind}: {getattr(error, 'reason', type(error).__name__)}", error
            )

    # ---- one handler a topic -----------------------------------------------------------------------------------

    def _on_birth(self, topic: Topic, payload: bytes) -> None:
        opened = self._open_clear(topic, payload)
        try:
            self._let_in(topic, opened)
        except ReplayError as error:
            if error.reason == "seen":
                return  # retained: the broker gives it again at every new session
            # A last will is as old as its connection and may be behind the window; its boot id decides.
        self._receiver.on_birth(topic.device, decode_body(opened.body, Birth))

    def _on_need(self, topic: Topic, payload: bytes) -> None:
        opened = self._open_clear(topic, payload)
        self._let_in(topic, opened)
        need = decode_body(opened.body, Need)
        if need.sha256.hex() != topic.sha256:
            raise MessageError("bitmap is for another blob than its topic")
        self._receiver.on_need(topic.device, need)

    def _on_join(self, topic: Topic, payload: bytes) -> None:
        opened = self._open_small(topic, payload)
        masking = _MASKING.get(opened.header.type)
        if masking is not None:
            self._receiver.on_masking(topic.device, decode_body(opened.body, masking))
        else:
            self._receiver.on_join(topic.device, decode_body(opened.body, Join))

    def _on_telemetry(self, topic: Topic, payload: bytes) -> None:
        opened = self._open_small(topic, payload)
        self._receiver.on_telemetry(topic.device, decode_body(opened.body, Telemetry))
        told = told_clock(opened.extensions)
        if told is not None:
            self._receiver.on_clock(topic.device, told)

    def _on_inference_report(self, topic: Topic, payload: bytes) -> None:
        opened = self._open_small(topic, payload)
        self._receiver.on_inference_report(topic.device, decode_body(opened.body, InferenceReport))

    def _on_upload(self, topic: Topic, payload: bytes) -> None:
        chunk = parse(payload)
        if self._receiver.is_answered(topic.device, chunk.transfer):
            self._repeat(topic.device, chunk)
            return
        message = self._assemble(topic.device, chunk)
        if message is None:
            return
        opened = open_sealed(
            message,
            signers=self._signers(),
            recipients=self._kem_keys,
            expect=self._expect(topic, _UPDATE_TYPES),
            now=self._clock.now(),
            limit_bytes=self._slot_bytes,
        )
        self._receiver.on_update(topic.device, opened, chunk.transfer, len(message))
        if self._partials is not None:
            self._partials.forget(topic.device, chunk.transfer)

    _HANDLERS: Mapping[str, Callable[[Inbox, Topic, bytes], None]] = {
        "st": _on_birth,
        "nd": _on_need,
        "jn": _on_join,
        "tm": _on_telemetry,
        "ir": _on_inference_report,
        "up": _on_upload,
    }

    # ---- inside ------------------------------------------------------------------------------------------------

    def _expect(self, topic: Topic, kind: str | frozenset[str]) -> Expect:
        return Expect("up", self._topics.tenant, self._topics.fleet, kind, topic.device, is_padded=True)

    def _open_clear(self, topic: Topic, payload: bytes) -> Opened:
        return open_signed(
            payload,
            signers=self._signers(),
            expect=self._expect(topic, topic.kind),
            now=self._clock.now(),
            limit_bytes=SMALL_MESSAGE_BYTES,
        )

    def _open_small(self, topic: Topic, payload: bytes) -> Opened:
        opened = open_sealed(
            payload,
            signers=self._signers(),
            recipients=self._kem_keys,
            expect=self._expect(topic, message_types(topic.kind)),
            now=self._clock.now(),
            limit_bytes=SMALL_MESSAGE_BYTES,
        )
        self._let_in(topic, opened)
        return opened

    def _let_in(self, topic: Topic, opened: Opened) -> None:
        key = (topic.device, opened.header.type)
        window = self._windows.pop(key, Window())
        try:
            window = window.accept(opened.header.epoch, opened.header.seq)
        finally:
            self._windows[key] = window
            while len(self._windows) > 8 * OPEN_SENDERS:
                self._windows.popitem(last=False)

    def _repeat(self, device: str, chunk: Chunk) -> None:
        """Neither gathered nor opened: the answer is known. One for all its chunks."""
        if not self._is_known(device):
            raise ChunkError("chunk of a device that is not enrolled")
        if chunk.index == chunk.total - 1:
            self._receiver.on_repeated(device, chunk.transfer)

    def _assemble(self, device: str, chunk: Chunk) -> bytes | None:
        """Adds a chunk to its device's transfers; the whole message when it was the last one missing.

        A topic is no proof of who speaks, so the budget is for all devices together: when it is exceeded, the device
        that was silent longest gives way, and is asked for what it lacks when it sends again.
        """
        if not self._is_known(device):
            raise ChunkError("chunk of a device that is not enrolled")
        reassembly = self._reassemblies.pop(device, None) or Reassembly(self._slot_bytes)
        self._granted_bytes -= reassembly.granted_bytes
        try:
            message = self._add(device, reassembly, chunk)
            missing = () if message is not None else reassembly.missing(chunk.transfer)
        finally:
            if reassembly.granted_bytes:
                self._reassemblies[device] = reassembly
                self._granted_bytes += reassembly.granted_bytes
        while self._granted_bytes > ASSEMBLY_BYTES and len(self._reassemblies) > 1:
            _, dropped = self._reassemblies.popitem(last=False)
            self._granted_bytes -= dropped.granted_bytes
        if missing and chunk.index == chunk.total - 1:
            receipt = Receipt(update_id=_ZERO_ID, transfer=chunk.transfer, verdict="missing", missing=missing)
            self._receiver.on_missing(device, receipt)
        return message

    def _add(self, device: str, reassembly: Reassembly, chunk: Chunk) -> bytes | None:
        """Adds a chunk in memory and on the disk; with the first of a transfer, what came of it in an earlier life."""
        partials = self._partials
        if partials is None:
            return reassembly.add(chunk)
        partials.sweep()
        if chunk.transfer not in reassembly.transfers():
            self._resume(partials, device, reassembly, chunk)
        is_news = not reassembly.has(chunk)
        try:
            message = reassembly.add(chunk)
        except ChunkError:
            partials.forget(device, chunk.transfer)
            raise
        if is_news and message is None:
            partials.keep(device, chunk)
        return message

    @staticmethod
    def _resume(partials: Partials, device: str, reassembly: Reassembly, chunk: Chunk) -> None:
        """What came of a transfer before a restart; one that was cut otherwise then starts over."""
        cut = (chunk.total, chunk.size_bytes, chunk.piece_bytes)
        for earlier in partials.restore(device, chunk.transfer):
            if (earlier.total, earlier.size_bytes, earlier.piece_bytes) != cut:
                partials.forget(device, chunk.transfer)
                return
            if earlier.index != chunk.index:
                reassembly.add(earlier)

    def _refuse(self, device: str, reason: str, error: PeerError | None) -> None:
        self.refused_total[reason] += 1
        key = (device, reason)
        if key in self._logged:
            return
        self._logged[key] = None
        while len(self._logged) > OPEN_SENDERS:
            self._logged.popitem(last=False)
        _log.warning("message_refused", device=device, reason=reason, error=str(error) if error else "")
