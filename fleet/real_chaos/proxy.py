"""A TCP proxy that breaks what goes through it: between agents and broker, agents and HTTPS, aggregator and broker.

Laws of the file: one event loop on a thread of its own; what a link does to bytes follows from its seed and from what
comes by; a fault that ends leaves the link as it was, with the bytes that it held back still in order. What it does is
TCP's: bytes are never lost within a connection (`black_hole` holds them back, as retransmission would), only with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from fleet.local_cloud import steady_port

Mode = Literal["clear", "black_hole", "refused", "resets", "bit_flips", "slow", "late"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)

RESET_SHARE = 0.05
"""Of the pieces that come by, how many break their connection, or lose a bit."""
SLOW_BYTES_PER_SECOND = 20_000
LATE_SECONDS = 0.5
_PIECE_BYTES = 16_384
_QUEUE_PIECES = 64
_BACKLOG = 256
_CALL_SECONDS = 10.0
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: what is not sent is thrown away, and the other end gets a RST


@dataclass(slots=True, eq=False)
class _Pair:
    """The two halves of one connection."""

    ends: list[asyncio.StreamWriter] = field(default_factory=list)

    def reset(self) -> None:
        for end in self.ends:
            sock: socket.socket | None = end.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
            end.transport.abort()


class Link:
    """One port that leads to another. Everything but `port` and `hits` is the loop's.

    Attributes:
        port: where to connect to.
        hits: how often a fault has touched bytes or a connection.
    """

    def __init__(self, target_port: int, seed: str) -> None:
        self.port = steady_port()
        self.hits = 0
        self._target_port = target_port
        self._rng = random.Random(seed)
        self._mode: Mode = "clear"
        self._is_clear = asyncio.Event()
        self._is_clear.set()
        self._server: asyncio.Server | None = None
        self._pairs: set[_Pair] = set()

    async def listen(self) -> None:
        """Takes the port."""
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self.port, backlog=_BACKLOG, limit=_PIECE_BYTES
        )

    async def become(self, mode: Mode) -> None:
        """Ends the fault that is there, and begins another."""
        if self._mode == "refused" and mode != "refused":
            await self.listen()
        self._mode = mode
        if mode == "black_hole":
            self._is_clear.clear()
        else:
            self._is_clear.set()
        if mode == "refused":
            self._close()

    def end(self) -> None:
        """Closes all."""
        self._is_clear.set()
        self._close()

    def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for pair in list(self._pairs):
            self.hits += 1
            pair.reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = _Pair([writer])
        self._pairs.add(pair)
        try:
            await self._hold_back()
            there, target = await asyncio.open_connection("127.0.0.1", self._target_port, limit=_PIECE_BYTES)
            pair.ends.append(target)
            await asyncio.gather(self._carry(reader, target, pair), self._carry(there, writer, pair))
        except OSError:
            pair.reset()
        finally:
            self._pairs.discard(pair)
            for end in pair.ends:
                end.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pair: _Pair) -> None:
        """One direction, until it ends; what is late is under way while more is read."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUE_PIECES)
        delivery = asyncio.create_task(self._deliver(queue, writer))
        try:
            while piece := await reader.read(_PIECE_BYTES):
                changed = await self._suffer(piece)
                if changed is None:
                    pair.reset()
                    return
                due = asyncio.get_running_loop().time() + (LATE_SECONDS if self._mode == "late" else 0.0)
                await queue.put((due, changed))
            await queue.put((0.0, b""))
            await delivery
            writer.write_eof()
        finally:
            delivery.cancel()

    async def _deliver(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due, piece = await queue.get()
            if not piece:
                return
            wait = due - asyncio.get_running_loop().time()
            if wait > 0:
                await asyncio.sleep(wait)
            writer.write(piece)
            await writer.drain()

    async def _suffer(self, piece: bytes) -> bytes | None:
        """What becomes of a piece; None for the end of its connection."""
        await self._hold_back()
        if self._mode in ("slow", "late"):
            self.hits += 1
        if self._mode == "slow":
            await asyncio.sleep(len(piece) / SLOW_BYTES_PER_SECOND)
        if self._mode in ("resets", "bit_flips") and self._rng.random() < RESET_SHARE:
            self.hits += 1
            return None if self._mode == "resets" else self._flipped(piece)
        return piece

    async def _hold_back(self) -> None:
        if not self._is_clear.is_set():
            self.hits += 1
            await self._is_clear.wait()

    def _flipped(self, piece: bytes) -> bytes:
        changed = bytearray(piece)
        changed[self._rng.randrange(len(changed))] ^= 1 << self._rng.randrange(8)
        return bytes(changed)


class FaultProxy:
    """Links on one thread. A context manager.

    Args:
        targets: port that each link leads to, by the link's name.
        seed: of resets and flipped bits.
    """

    def __init__(self, targets: dict[str, int], seed: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._targets = targets
        self._seed = seed
        self.links: dict[str, Link] = {}

    def port(self, name: str) -> int:
        """Where a link is entered."""
        return self.links[name].port

    def become(self, name: str, mode: Mode) -> None:
        """Ends a link's fault, or begins one."""
        self._call(self.links[name].become(mode))

    def hits(self, name: str) -> int:
        """How often a link's faults have touched something."""
        return self.links[name].hits

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._call(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_SECONDS)
        self._loop.close()

    async def _open(self) -> None:
        for name, port in self._targets.items():
            self.links[name] = Link(port, f"{name} {self._seed}")
            await self.links[name].listen()

    async def _end(self) -> None:
        for link in self.links.values():
            link.end()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_CALL_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
