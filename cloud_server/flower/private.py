"""The parts of Flower that are not public but needed, all of them, in one place.

Laws of the file: nothing else in the project touches a private part of flwr; a contract test covers each
function here, so a new Flower version fails there first. Written for flwr 1.41 (ran on 1.23 to 1.42).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, Message
from flwr.app.exception import AppExitException
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

__all__ = [
    "NODE_UNAVAILABLE",
    "AppExitException",
    "ArrayView",
    "Run",
    "aggregate_metricrecords",
    "cheap_collections",
    "empty_run",
    "set_identity",
    "set_message_id",
]

RUN_ID = 1
SERVER_NODE_ID = 1
NODE_UNAVAILABLE: int = ErrorCode.NODE_UNAVAILABLE
_STYPE = "numpy.ndarray"

# Flower logs every round at INFO, to a handler of its own and with a level that it sets while it is imported;
# our own round lines say the same.
logging.getLogger("flwr").setLevel(logging.WARNING)


def set_identity() -> None:
    """Names this process as a server task: without it no `Message` can be made, and every strategy raises."""
    TaskIdentity.run_id = RUN_ID
    TaskIdentity.node_id = SERVER_NODE_ID
    TaskIdentity.task_id = 0


def set_message_id(message: Message, message_id: str) -> None:
    """Gives a message its id, as Flower's own grids do: there is no setter."""
    message.metadata.__dict__["_message_id"] = message_id


def empty_run() -> Run:
    """What `Grid.run` answers: legacy apps ask for it."""
    return Run.create_empty(RUN_ID)


@contextmanager
def cheap_collections() -> Iterator[None]:
    """Takes what lives now out of the sight of the garbage collector.

    QFedAvg and Bulyan collect by hand at every reply, and with torch imported each collection takes 0.1 s.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class ArrayView(Array):
    """An `Array` over numpy memory that it does not copy; npy bytes are made only when somebody asks for
    `data`."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.__dict__["_values"] = values
        self.__dict__["dtype"] = str(values.dtype)
        self.__dict__["shape"] = tuple(values.shape)
        self.__dict__["stype"] = _STYPE

    @property
    def data(self) -> bytes:
        return bytes(Array(np.ascontiguousarray(self._values)).data)

    @data.setter
    def data(self, _value: bytes) -> None:
        raise AttributeError("an array view has no bytes of its own")

    @property
    def _values(self) -> NDArray[Any]:
        values: NDArray[Any] = self.__dict__["_values"]
        return values

    def numpy(self) -> NDArray[Any]:
        return self._values
