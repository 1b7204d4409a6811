"""An aggregator that only takes what comes: opens it, keeps it, and acknowledges it when it is told to.

Laws of the file: every byte is real (sealed to its key, signed with its key); it decides nothing, so that what a device
owes can be counted against what arrived and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cloud_server.keys import CloudKeys
from fleet.simulated_device import FLEET, TENANT
from fleet.virtual import VirtualTime
from wire import envelope
from wire.chunks import Reassembly
from wire.errors import ShoalError
from wire.header import Header
from wire.messages import Body, Evaluation, Join, Receipt, Update, decode_body, encode_body
from wire.primitives import VerifyKey, sha256
from wire.topics import Topics
from wire.transport import Packet, Received, TransportEvent
from wire.transport.memory import MemoryBroker, MemoryTransport

_LIMIT_BYTES = 2**22


@dataclass
class Arrived:
    """What has arrived.

    Attributes:
        bodies: SHA-256 of each update's body, by its id; more than one content of an id is two.
        declined: reasons, by order.
        unopened: what did not open, and why.
    """

    bodies: dict[str, set[str]] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    unopened: list[str] = field(default_factory=list)


class Receiver:
    """The other end of one device's outbox.

    Args:
        does_answer: whether it acknowledges.
    """

    def __init__(
        self,
        keys: CloudKeys,
        device: str,
        key: VerifyKey,
        *,
        time: VirtualTime,
        broker: MemoryBroker,
        does_answer: bool = True,
    ) -> None:
        self.arrived = Arrived()
        self.does_answer = does_answer
        self._keys = keys
        self._device = device
        self._signers = {key.key_id: envelope.Signer(device, key)}
        self._time = time
        self._topics = Topics(TENANT, FLEET)
        self._reassembly = Reassembly(_LIMIT_BYTES, max_transfers=64)
        self._seq = 0
        self._heard = 0
        self._transport = MemoryTransport(broker, "receiver", queue_packets=100_000)
        self._transport.start(self._take, filters=[(name, 1) for name in self._topics.cloud_filters()])

    def settle(self) -> int:
        heard, self._heard = self._heard, 0
        return heard

    def next_moment(self) -> float:
        return float("inf")

    def _take(self, event: TransportEvent) -> None:
        if not isinstance(event, Received):
            return
        self._heard += 1
        topic = self._topics.parse(event.packet.topic)
        if topic.kind not in ("up", "jn"):
            return
        message: bytes | None = event.packet.payload
        try:
            if topic.kind == "up":
                message = self._reassembly.add(event.packet.payload)
            if message is not None:
                self._keep(self._open(message, topic.kind), message)
        except ShoalError as error:
            self.arrived.unopened.append(f"{topic.kind}: {error}")

    def _open(self, message: bytes, kind: str) -> Body:
        types = frozenset((Update.TYPE, Evaluation.TYPE)) if kind == "up" else kind
        opened = envelope.open_sealed(
            message,
            signers=self._signers,
            recipients={key.key_id: key for key in self._keys.kem},
            expect=envelope.Expect("up", TENANT, FLEET, types, self._device),
            now=self._time.now(),
            limit_bytes=_LIMIT_BYTES,
        )
        body = {each.TYPE: each for each in (Update, Evaluation, Join)}[opened.header.type]
        return decode_body(opened.body, body)

    def _keep(self, body: Body, message: bytes) -> None:
        if isinstance(body, Join):
            if not body.accepted:
                self.arrived.declined[body.order_id.hex()] = body.reason
        elif isinstance(body, Update | Evaluation):
            known = self.arrived.bodies.setdefault(body.update_id.hex(), set())
            verdict = "duplicate" if known else "stored"
            known.add(sha256(encode_body(body)).hex())
            if self.does_answer:
                self._say(Receipt(update_id=body.update_id, transfer=sha256(message), verdict=verdict))  # type: ignore[arg-type]

    def _say(self, body: Receipt) -> None:
        self._seq += 1
        header = Header(
            type=body.TYPE,
            direction="down",
            tenant=TENANT,
            fleet=FLEET,
            device=self._device,
            epoch=1,
            seq=self._seq,
        )
        message = envelope.sign(header, encode_body(body), signer=self._keys.order)
        self._transport.publish(Packet(self._topics.by_device("ak", self._device), message))
