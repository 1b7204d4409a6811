"""What waits to be published: two bounded queues in front of a transport that never blocks.

Laws of the file: control messages (orders, receipts, invitations) go before bulk (chunks of a head); nothing is queued
without a bound; what does not fit is dropped and counted, because everything that is sent here is asked for again by
whoever misses it (an order is resent, a receipt is given again, a chunk is named in a bitmap).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from wire.errors import BackpressureError, OversizeError
from wire.transport import Packet, Transport

CONTROL_PACKETS = 65_536
BULK_PACKETS = 8_192


class Sender:
    """Publishes in order of importance as fast as the transport takes it.

    Args:
        on_sent: told of every packet that the transport took.
        may_send: raises when nothing of ours may leave any more.

    Attributes:
        dropped_total: packets that did not fit into a queue or were larger than the broker accepts.
        sent_bytes_total: payload bytes that the transport took.
    """

    def __init__(
        self,
        transport: Transport,
        on_sent: Callable[[Packet], None] = lambda packet: None,
        *,
        may_send: Callable[[], None] = lambda: None,
    ) -> None:
        self._transport = transport
        self._may_send = may_send
        self._on_sent = on_sent
        self._control: deque[Packet] = deque()
        # One entry a topic: a chunk that is asked for twice while it waits goes out once.
        self._bulk: OrderedDict[str, Packet] = OrderedDict()
        self.dropped_total = 0
        self.sent_bytes_total = 0

    @property
    def backlog(self) -> int:
        """Packets that wait."""
        return len(self._control) + len(self._bulk)

    def send(self, packet: Packet) -> None:
        """Queues a control message and publishes what can go now."""
        if len(self._control) >= CONTROL_PACKETS:
            self._control.popleft()
            self.dropped_total += 1
        self._control.append(packet)
        self.pump()

    def send_bulk(self, packet: Packet) -> None:
        """Queues a chunk, which goes out with the next `pump`; one that waits already is not queued again.

        It is not published at once, because the invitation that names it is sent next and must arrive before it: a
        device drops a chunk that nothing named, and would ask for it seconds later.
        """
        if packet.topic in self._bulk:
            return
        if len(self._bulk) >= BULK_PACKETS:
            self.dropped_total += 1
            return
        self._bulk[packet.topic] = packet

    def pump(self) -> None:
        """Hands packets to the transport until it is full; call it again after a `Published` or `Connected`."""
        while self._control or self._bulk:
            is_control = bool(self._control)
            packet = self._control[0] if is_control else next(iter(self._bulk.values()))
            self._may_send()
            try:
                self._transport.publish(packet)
            except BackpressureError:
                return
            except OversizeError:
                self.dropped_total += 1
            else:
                self.sent_bytes_total += len(packet.payload)
                self._on_sent(packet)
            if is_control:
                self._control.popleft()
            else:
                del self._bulk[packet.topic]
