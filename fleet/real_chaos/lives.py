"""Processes that are there to be killed: `python -m fleet.real_chaos.lives ROLE FD` forks one whenever it is asked to.

The nursery imports what the role needs once and opens nothing; each life is a fork of it, so that a life costs
milliseconds and not the second that its imports take. Laws of the file: the nursery has one thread and no runtime of a
foreign library in it when it forks; what a life does is the product's own code with its real files and databases, and
what is put in its place is only what is outside of the machine (broker, aggregator or devices, time).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable

from fleet.real_chaos.link import Begin, Ended, NodeEnd, Ready
from wire.errors import ShoalError

_EXIT_ENDED = 8
_PR_SET_PDEATHSIG = 1
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)

Life = Callable[[Begin, NodeEnd], None]


def nursery(live: Life, door: socket.socket) -> None:
    """Forks a life for every descriptor that comes through the door; ends when the door is closed.

    Says the process id of each at once, and how it ended (`os.waitpid`'s status) when it did.
    """
    library = ctypes.CDLL(None, use_errno=True)
    while True:
        data, descriptors, _, _ = socket.recv_fds(door, 1, 1)
        if not data:
            return
        child = os.fork()
        if child == 0:
            door.close()
            # Where only ancestors may trace (Yama), whoever strikes is none.
            library.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY)
            library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            _be_born(live, descriptors[0])
        os.close(descriptors[0])
        door.send(child.to_bytes(8, "big"))
        _, status = os.waitpid(child, 0)
        door.send(status.to_bytes(8, "big"))


def _be_born(live: Life, descriptor: int) -> None:
    end = NodeEnd(socket.socket(fileno=descriptor))
    end.send(Ready())
    begin = end.receive()
    code = 0
    if isinstance(begin, Begin):
        try:
            live(begin, end)
        except ShoalError as error:
            end.send(Ended(f"{type(error).__name__}: {error}"))
            code = _EXIT_ENDED
    os._exit(code)


def main(role: str, descriptor: int) -> None:
    """The nursery of a role."""
    import logging

    logging.disable(logging.CRITICAL)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    live: Life
    if role == "device":
        from fleet.real_chaos.device_life import live_device as live
    else:
        from fleet.real_chaos.cloud_life import live_cloud as live
    door = socket.socket(fileno=descriptor)
    door.send((0).to_bytes(8, "big"))
    nursery(live, door)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
