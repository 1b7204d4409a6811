"""The receiver of a transport in a test: keeps events in order and waits for them with a deadline."""

from __future__ import annotations

import queue
from typing import TypeVar

from wire.transport import Received, TransportEvent

Event = TypeVar("Event", bound=TransportEvent)

DEADLINE_SECONDS = 20.0


class Mailbox:
    """Give it to `start` as `deliver`."""

    def __init__(self) -> None:
        self._queue: queue.Queue[TransportEvent] = queue.Queue()
        self.seen: list[TransportEvent] = []

    def __call__(self, event: TransportEvent) -> None:
        self._queue.put(event)

    def take(self, kind: type[Event], count: int = 1) -> list[Event]:
        """Waits until `count` more events of a kind have come; others on the way are only kept in `seen`."""
        found: list[Event] = []
        while len(found) < count:
            try:
                event = self._queue.get(timeout=DEADLINE_SECONDS)
            except queue.Empty:
                raise AssertionError(
                    f"{len(found)} of {count} {kind.__name__}; seen: {self.seen[-5:]}"
                ) from None
            self.seen.append(event)
            if isinstance(event, kind):
                found.append(event)
        return found

    def next(self, kind: type[Event]) -> Event:
        """Waits for one event of a kind."""
        return self.take(kind)[0]

    def until_payload(self, payload: bytes) -> Received:
        """Waits for the packet with this payload."""
        while True:
            event = self.next(Received)
            if event.packet.payload == payload:
                return event

    def drain(self) -> list[TransportEvent]:
        """What is there now, without waiting."""
        found = []
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        self.seen += found
        return found
