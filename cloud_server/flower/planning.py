"""What a strategy sees while it plans a round: a `Grid` that knows who is there, and seeded chance.

Laws of the file: no wait without an end (Flower's `sample_nodes` sleeps for ever when too few nodes are there, so
`get_node_ids` raises instead); sampling is seeded (Flower draws from the global `random`, and numpy's global
generator makes its noise: both are saved, seeded and put back).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from cloud_server.flower.private import Run, empty_run
from wire.errors import QuorumError, RoundError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the two global generators that Flower draws from, and restores them afterwards.

    Of numpy's generator all 256 bits that follow from the seed are used: where it makes the noise of
    differential privacy, the seed must be secret and from a good source.
    """
    digest = hashlib.sha256(b"shoal flower seed\0" + str(seed).encode()).digest()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(digest)
    np.random.seed(np.frombuffer(digest, dtype="<u4"))
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


class PlanningGrid(Grid):
    """The grid of a strategy's `configure_…`: knows who is there, sends nothing.

    Args:
        node_ids: who is there.
        needed: how many the strategy wants at least.
    """

    # `configure_…` asks once and `sample_nodes` once more; whoever asks on is waiting for more nodes to come.
    _MOST_QUESTIONS = 8

    def __init__(self, node_ids: Iterable[int], needed: int = 0) -> None:
        self._node_ids = list(node_ids)
        self._needed = needed
        self._questions = 0

    def get_node_ids(self) -> Iterable[int]:
        """Who is there.

        Raises:
            QuorumError: fewer than needed, or the strategy asks again and again.
        """
        self._questions += 1
        present = len(self._node_ids)
        if present < self._needed or self._questions > self._MOST_QUESTIONS:
            needed = max(self._needed, present + 1)
            raise QuorumError(f"{present} of {needed} nodes are present", present=present, needed=needed)
        return list(self._node_ids)

    def set_run(self, run: Run) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Run:
        return empty_run()

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise RoundError("a strategy must not send messages while it plans a round")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise RoundError("a strategy must not pull messages while it plans a round")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise RoundError("a strategy must not exchange messages while it plans a round")
