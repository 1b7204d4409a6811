"""Where a stock ServerApp's thread and the aggregator's thread meet.

Laws of the file: the app's thread only waits here, and every wait ends: replies come by the exchange's deadline, or
the board closes and the waiting raises; the aggregator's thread never waits. Numbers, not clocks, name exchanges.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol

from flwr.app import Message

from wire.errors import QuorumError, RoundError, ShoalError

MakeReply = Callable[[], Message]


class Changed(Protocol):
    """A `threading.Condition`, as far as a board needs one."""

    def __enter__(self) -> bool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def wait_for(self, predicate: Callable[[], object], timeout: float | None = None) -> object:
        """Waits until it is so, or the time is up."""
        ...

    def notify_all(self) -> None:
        """Something has changed."""
        ...


MAX_WAITING: Final = 256
"""Exchanges that the aggregator has not begun; an app has one or a few under way."""


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """One reply for the app.

    Attributes:
        message_id: of the message that it replies to.
        name: of what it is made from: the id of an update (hex), or `error`.
    """

    message_id: str
    name: str
    make: MakeReply


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
        changed: what guards the board and is waited on; a simulation gives its own, in step with its time.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None, changed: Changed | None = None) -> None:
        self._wake = wake
        self._changed: Changed = changed or threading.Condition()
        self._waiting: deque[Exchange] = deque()
        self._replies: dict[str, Given] = {}
        self._answered: set[str] = set()
        self._failures: dict[str, ShoalError] = {}
        self._node_ids: tuple[int, ...] = ()
        self._last_number = 0
        self._closed: ShoalError | None = None
        self._is_ended = False

    # ---- for the app's thread ----

    @property
    def next_number(self) -> int:
        """The number of the exchange that comes next, from 1."""
        return self._last_number + 1

    def node_ids(self, quorum: int, seconds: float) -> tuple[int, ...]:
        """Who is there.

        Raises:
            QuorumError: fewer than `quorum` for so many seconds.
            RoundError: the board was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._node_ids) >= quorum or self._closed, seconds)
            self.check_open()
            present = len(self._node_ids)
            if present < quorum:
                raise QuorumError(f"{present} of {quorum} nodes are present", present=present, needed=quorum)
            return self._node_ids

    def check_room(self) -> None:
        """Looks whether messages would be taken; asked before they are put down.

        Raises:
            RoundError: the board was closed, or too many wait.
        """
        with self._changed:
            self.check_open()
            if len(self._waiting) >= MAX_WAITING:
                raise RoundError(
                    "the app hands over exchanges faster than the fleet takes them",
                    hint="pull the replies of one before the next is pushed",
                )

    def submit(self, messages: Sequence[Message], seconds: float | None) -> Exchange:
        """Hands messages over; returns at once. Raises like `check_room`."""
        with self._changed:
            self.check_room()
            self._last_number += 1
            exchange = Exchange(self._last_number, tuple(messages), seconds)
            self._waiting.append(exchange)
        self._wake()
        return exchange

    def wait(self, ids: Sequence[str]) -> None:
        """Until every one of these messages has its reply, or cannot be sent.

        Raises:
            RoundError: the board was closed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or all(i in self._replies or i in self._failures for i in ids)
            )
            self.check_open()

    def look(self, message_ids: Sequence[str]) -> list[Given]:
        """The replies that are there; `drop` them once they count as given.

        Raises:
            RoundError: the exchange of one of them cannot be made, or the board was closed.
        """
        with self._changed:
            for message_id in message_ids:
                if message_id in self._failures:
                    raise self._failures[message_id]
            self.check_open()
            return [self._replies[i] for i in message_ids if i in self._replies]

    def drop(self, message_ids: Sequence[str]) -> None:
        """What was given, or told, is given once."""
        with self._changed:
            for message_id in message_ids:
                self._replies.pop(message_id, None)
                self._failures.pop(message_id, None)

    def break_off(self, error: ShoalError) -> None:
        """Whatever the app does from now on, it is told this."""
        with self._changed:
            self._closed = self._closed or error
            self._changed.notify_all()

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

    def begin_after(self, number: int) -> None:
        """The next exchange is the one after this number."""
        with self._changed:
            self._last_number = number

    def set_node_ids(self, node_ids: Sequence[int]) -> None:
        with self._changed:
            self._node_ids = tuple(node_ids)
            self._changed.notify_all()

    def next(self) -> Exchange | None:
        """The oldest exchange that waits."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def deliver(self, reply: Given) -> None:
        """One reply; the first for a message counts."""
        with self._changed:
            if reply.message_id in self._answered:
                return
            self._answered.add(reply.message_id)
            self._replies[reply.message_id] = reply
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

    def check_open(self) -> None:
        """Raises why the board was closed, if it was."""
        if self._closed is not None:
            raise self._closed
