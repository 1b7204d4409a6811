"""Packets on their way out: a queue in front of the transport, which accepts only so much at a time.

Laws of the file: the transport is never waited for; a full transport stops the queue until it reports progress; what
the cloud waits for goes first, and what may be lost (QoS 0: telemetry and reports) last, and is what is given up when
the queue is full; what a reconnection says anew (births, uploads, reports) is dropped when the connection goes, the
rest is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from process.logs import get_logger
from wire.errors import BackpressureError, OversizeError
from wire.transport import Packet, Transport

_log = get_logger("edge_agent.uplink.outgoing")

MAX_QUEUED: Final = 8192
# In this order: answers and requests, updates, what may be lost.
_SAID, _UPLOADED, _LOSABLE = _LANES = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class _Queued:
    packet: Packet
    upload: bytes
    survives: bool

    @property
    def lane(self) -> int:
        if self.upload:
            return _UPLOADED
        return _SAID if self.packet.qos else _LOSABLE


class Door(Protocol):
    """What stands between the queue and a link with limits (`link/door.py`)."""

    def may_upload(self, count: int) -> bool:
        """Whether a packet of an update of so many bytes may go now."""
        ...

    def passed(self, count: int, *, is_upload: bool = False) -> None:
        """So many bytes went to the transport."""
        ...


class _NoDoor:
    def may_upload(self, count: int) -> bool:
        return True

    def passed(self, count: int, *, is_upload: bool = False) -> None:
        """Nobody counts."""


class Outgoing:
    """The queue of one device. Used from the agent's loop only.

    Args:
        door: holds updates back, and counts everything; None for a link without limits.
    """

    def __init__(self, transport: Transport, door: Door | None = None) -> None:
        self._transport = transport
        self._door: Door = door or _NoDoor()
        self._lanes: tuple[deque[_Queued], ...] = tuple(deque() for _ in _LANES)
        self._uploading: dict[bytes, int] = {}
        self.sent_bytes_total = 0
        self.dropped_total = 0

    def say(self, packet: Packet, *, survives: bool = False) -> None:
        """Queues one packet; `survives`: it is kept while there is no connection."""
        self._push(_Queued(packet, b"", survives))

    def upload(self, update_id: bytes, packets: Iterable[Packet]) -> None:
        """Queues the packets of an update, unless some of them are still queued from before."""
        if update_id not in self._uploading:
            for packet in packets:
                self._push(_Queued(packet, update_id, survives=False))

    def withdraw(self, update_id: bytes) -> None:
        """Takes an update out of the queue: it will be said in other bytes."""
        self._keep(lambda queued: queued.upload != update_id)
        self._uploading.pop(update_id, None)

    def pump(self) -> None:
        """Hands over as much as the transport takes now."""
        for lane in self._lanes:
            while lane:
                queued = lane[0]
                size = len(queued.packet.payload) + len(queued.packet.topic)
                if queued.lane == _UPLOADED and not self._door.may_upload(size):
                    break
                try:
                    self._transport.publish(queued.packet)
                except BackpressureError:
                    return
                except OversizeError as error:
                    _log.warning("packet dropped", topic=queued.packet.topic, reason=str(error))
                    self.dropped_total += 1
                else:
                    self.sent_bytes_total += size
                    self._door.passed(size, is_upload=queued.lane == _UPLOADED)
                lane.popleft()
                self._settle(queued)

    def connection_lost(self) -> None:
        """Keeps only what is not said anew at the next connection."""
        self._keep(lambda queued: queued.survives)
        self._uploading.clear()

    def _keep(self, is_kept: Callable[[_Queued], bool]) -> None:
        self._lanes = tuple(deque(filter(is_kept, lane)) for lane in self._lanes)

    def _push(self, queued: _Queued) -> None:
        if sum(map(len, self._lanes)) >= MAX_QUEUED:
            self.dropped_total += 1
            if queued.lane == _LOSABLE or not self._lanes[_LOSABLE]:
                return
            self._lanes[_LOSABLE].popleft()
        self._lanes[queued.lane].append(queued)
        if queued.upload:
            self._uploading[queued.upload] = self._uploading.get(queued.upload, 0) + 1

    def _settle(self, queued: _Queued) -> None:
        left = self._uploading.get(queued.upload, 0) - 1
        if left > 0:
            self._uploading[queued.upload] = left
        else:
            self._uploading.pop(queued.upload, None)
