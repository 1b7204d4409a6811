"""Where a stock ServerApp's thread and the aggregator's thread meet.

Laws of the file: the app's thread only waits here, and every wait ends: replies come by the exchange's deadline, or
the board closes and the waiting raises; the aggregator's thread never waits. Numbers, not clocks, name exchanges.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message

from wire.errors import QuorumError, RoundError, ShoalError

MakeReply = Callable[[], Message]


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """Messages that the app sent together. `seconds` is how long it will wait, or None."""

    number: int
    messages: tuple[Message, ...]
    seconds: float | None

    @property
    def message_ids(self) -> tuple[str, ...]:
        return tuple(message.metadata.message_id for message in self.messages)


class Board:
    """Thread-safe. Makers of replies are put here, not replies: they are decoded in the app's thread, when read.

    Args:
        wake: called from the app's thread when there is something for the aggregator's.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self._wake = wake
        self._changed = threading.Condition()
        self._waiting: deque[Exchange] = deque()
        self._replies: dict[str, MakeReply] = {}
        self._answered: set[str] = set()
        self._failures: dict[str, ShoalError] = {}
        self._node_ids: tuple[int, ...] = ()
        self._recorded: dict[int, tuple[int, ...]] = {}
        self._last_number = 0
        self._closed: ShoalError | None = None
        self._is_ended = False

    # ---- for the app's thread ----

    @property
    def next_number(self) -> int:
        """The number of the exchange that comes next, from 1."""
        return self._last_number + 1

    def node_ids(self, quorum: int, seconds: float) -> tuple[int, ...]:
        """Who is there; in a run that is played back, who was there then.

        Raises:
            QuorumError: fewer than `quorum` for so many seconds.
            RoundError: the board was closed.
        """
        with self._changed:
            recorded = self._recorded.get(self.next_number)
            if recorded is not None:
                return recorded
            self._changed.wait_for(lambda: len(self._node_ids) >= quorum or self._closed, seconds)
            self._check_open()
            present = len(self._node_ids)
            if present < quorum:
                raise QuorumError(f"{present} of {quorum} nodes are present", present=present, needed=quorum)
            return self._node_ids

    def submit(self, messages: Sequence[Message], seconds: float | None) -> Exchange:
        """Hands messages over; returns at once."""
        with self._changed:
            self._check_open()
            self._last_number += 1
            exchange = Exchange(self._last_number, tuple(messages), seconds)
            self._waiting.append(exchange)
        self._wake()
        return exchange

    def wait(self, exchange: Exchange) -> None:
        """Until every message of an exchange has its reply.

        Raises:
            RoundError: the exchange cannot be made, or the board was closed.
        """
        ids = exchange.message_ids
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or all(i in self._replies or i in self._failures for i in ids)
            )
            self._check_open()

    def take(self, message_ids: Sequence[str]) -> list[MakeReply]:
        """The replies that are there, each once.

        Raises:
            RoundError: the exchange of one of them cannot be made.
        """
        with self._changed:
            for message_id in message_ids:
                if message_id in self._failures:
                    raise self._failures.pop(message_id)
            return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def end(self, error: ShoalError | None = None) -> None:
        """The app has returned, or failed."""
        with self._changed:
            self._is_ended = True
            self._closed = self._closed or error
        self._wake()

    # ---- for the aggregator's thread ----

    @property
    def is_ended(self) -> bool:
        """Whether the app is over and everything it asked for was taken."""
        with self._changed:
            return self._is_ended and not self._waiting

    @property
    def error(self) -> ShoalError | None:
        """Why the app failed."""
        return self._closed

    def set_recorded(self, node_ids: Mapping[int, tuple[int, ...]]) -> None:
        """Who was there at each exchange of an earlier process."""
        with self._changed:
            self._recorded = dict(node_ids)

    def set_node_ids(self, node_ids: Sequence[int]) -> None:
        with self._changed:
            self._node_ids = tuple(node_ids)
            self._changed.notify_all()

    def next(self) -> Exchange | None:
        """The oldest exchange that waits."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def deliver(self, message_id: str, make_reply: MakeReply) -> None:
        """One reply; the first for a message counts."""
        with self._changed:
            if message_id in self._answered:
                return
            self._answered.add(message_id)
            self._replies[message_id] = make_reply
            self._changed.notify_all()

    def refuse(self, exchange: Exchange, error: ShoalError) -> None:
        """The exchange cannot be made: `error` is raised in the app."""
        with self._changed:
            self._failures |= dict.fromkeys(exchange.message_ids, error)
            self._changed.notify_all()

    def close(self) -> None:
        """The aggregator stops: whatever waits is woken by an error."""
        with self._changed:
            self._closed = self._closed or RoundError("the aggregator stops")
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise self._closed
