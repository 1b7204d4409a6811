"""`ShoalGrid`: what a stock Flower ServerApp talks through; its calls block, in the app's own thread.

Laws of the file: every call ends, by the exchange's deadline or an error; what a call gives is on the tape before it
returns, and comes from the tape while there is something recorded; an error of the tape's is told to the app from then
on, whatever it does; replies are re-iterable and decoded as they are read; chance is seeded (Flower's `sample_nodes`
draws from the global `random`), so that an app that does the same after a restart asks the same nodes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, overload

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from cloud_server.flower.exchange import Board, Exchange, Given, MakeReply
from cloud_server.flower.private import Run, empty_run, set_identity, set_message_id
from cloud_server.flower.tape import Tape
from cloud_server.rounds.draws import draw_seed
from wire.errors import QuorumError, RoundError

_T = TypeVar("_T")


class ShoalGrid(Grid):
    """One run's grid.

    Args:
        tape: what the app did in an earlier process, and does in this one.
        seed: of the run, secret.
        quorum: `get_node_ids` waits for so many nodes.
        quorum_seconds: … and for so long; as long may an app ask on without sending anything.
    """

    def __init__(
        self,
        board: Board,
        tape: Tape,
        *,
        seed: int,
        quorum: int = 1,
        quorum_seconds: float = 600.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        set_identity()
        self._board = board
        self._tape = tape
        self._seed = seed
        self._quorum = quorum
        self._quorum_seconds = quorum_seconds
        self._monotonic = monotonic
        self._run = empty_run()
        self._asked: tuple[int, float] = (0, 0.0)

    # ---- who is there ----

    def get_node_ids(self) -> Iterable[int]:
        """The present, approved nodes.

        Raises:
            QuorumError: too few for `quorum_seconds`, or an app that waits for more than there are for as long.
            RoundError: the aggregator stops.
        """
        node_ids = self._on_tape(self._tape.told_nodes)
        if node_ids is None:
            node_ids = self._present()
            self._tape.keep_nodes(node_ids)
        # What the app draws next is drawn from this list, by the global generator.
        random.seed(draw_seed(self._seed, "serverapp", self._board.next_number))
        return list(node_ids)

    def _present(self) -> tuple[int, ...]:
        number, now = self._board.next_number, self._monotonic()
        if self._asked[0] != number:
            self._asked = (number, now)
        node_ids = self._board.node_ids(self._quorum, self._quorum_seconds)
        if now - self._asked[1] > self._quorum_seconds:
            present = len(node_ids)
            raise QuorumError(
                f"the app waits for more nodes than the {present} that are there",
                hint="lower its min_available_nodes",
                present=present,
                needed=present + 1,
            )
        return node_ids

    # ---- messages ----

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hands messages over without waiting; returns their ids."""
        exchange = self._submit(messages, None)
        return [] if exchange is None else list(exchange.message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that have come, each once. One that never comes is an error reply after the deadline."""
        return [given.make() for given in self._pull(list(message_ids))]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Sends and waits until every node has answered, declined or gone, or the deadline has come.

        Returns:
            A reply for each message, as a sequence that decodes what is read; an error reply for a node that did
            not answer.

        Raises:
            RoundError: the messages cannot be sent, or the aggregator stops.
        """
        exchange = self._submit(messages, timeout)
        if exchange is None:
            return []
        return LazyReplies([given.make for given in self._pull(exchange.message_ids, is_waiting=True)])

    def _submit(self, messages: Iterable[Message], timeout: float | None) -> Exchange | None:
        """None when there is nothing to send: a strategy without evaluation sends an empty list."""
        listed = list(messages)
        if not listed:
            return None
        number = self._board.next_number
        for index, message in enumerate(listed):
            set_message_id(message, f"{number}-{index}")
        self._board.check_room()
        self._on_tape(lambda: self._tape.push(number, listed))
        return self._board.submit(listed, timeout)

    def _pull(self, message_ids: Sequence[str], *, is_waiting: bool = False) -> list[Given]:
        recorded = self._on_tape(lambda: self._tape.told_pull(message_ids, is_waiting=is_waiting))
        if recorded is not None:
            return self._given_again(recorded)
        if is_waiting:
            self._board.wait(message_ids)
        try:
            found = self._board.look(message_ids)
        except RoundError as error:
            if self._board.error is None:
                self._tape.keep_refusal(str(error))
                self._board.drop(message_ids)
            raise
        self._tape.keep_pull((given.message_id, given.name) for given in found)
        self._board.drop([given.message_id for given in found])
        return found

    def _given_again(self, recorded: Sequence[tuple[str, str]]) -> list[Given]:
        """The replies that the app had at this point, out of the books."""
        ids = [message_id for message_id, _ in recorded]
        self._board.wait(ids)
        found = self._board.look(ids)
        other = [(given.message_id, given.name) for given in found]
        if other != list(recorded):
            raise self._broken(
                RoundError("the books hold other replies than the app was given before", ids=ids)
            )
        self._board.drop(ids)
        return found

    def _on_tape(self, ask: Callable[[], _T]) -> _T:
        """What the tape says. If the app does something else than is recorded, it is told nothing more."""
        self._board.check_open()
        try:
            return ask()
        except RoundError as error:
            if "position" in error.facts:
                self._broken(error)
            raise

    def _broken(self, error: RoundError) -> RoundError:
        self._board.break_off(error)
        return error

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run


class LazyReplies(Sequence[Message]):
    """Replies that are made when they are read, anew each time: a cohort of them is never in memory at once."""

    def __init__(self, makers: Sequence[MakeReply]) -> None:
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    @overload
    def __getitem__(self, index: int) -> Message: ...

    @overload
    def __getitem__(self, index: slice) -> LazyReplies: ...

    def __getitem__(self, index: int | slice) -> Message | LazyReplies:
        if isinstance(index, slice):
            return LazyReplies(self._makers[index])
        return self._makers[index]()

    def __iter__(self) -> Iterator[Message]:
        return (make() for make in self._makers)
