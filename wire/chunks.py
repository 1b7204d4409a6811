"""Large messages cut into chunks, and put together again inside a budget that is granted beforehand.

    chunk = "SC" || version(1) || flags(0) || index(4) || total(4) || size(8) || transfer(32) || piece

`transfer` is SHA-256 of the whole message, `size` its length; big-endian. All pieces but the last are equally
long. A chunk header is signed by nobody: it only steers bytes into a buffer, and what comes out is verified
by its envelope. Laws of the file: nothing is allocated beyond `limit_bytes`, whatever arrives; a sender has
at most `MAX_TRANSFERS` open; a message comes out only if its hash is right; a piece that is there already is
never replaced by another. Source: docs/protocol.md, clause 6.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from wire.errors import ChunkError
from wire.primitives import sha256

MAX_CHUNK_BYTES: Final = 122_880
"""Hosted brokers stop at 128 KB; nothing of ours is larger than this, header included."""
MAX_TRANSFERS: Final = 2
MAX_CHUNKS: Final = 4096
_HEADER: Final = struct.Struct(">2sBBIIQ32s")
HEADER_BYTES: Final = _HEADER.size
_MAGIC: Final = b"SC"
_VERSION: Final = 1
_MIN_PAYLOAD_BYTES: Final = 256
# Topic (at most 6 levels of 64), MQTT's fixed header and properties.
_PACKET_OVERHEAD_BYTES: Final = 1024


def max_payload_bytes(max_packet_bytes: int) -> int:
    """The largest chunk for a broker that accepts packets of `max_packet_bytes` (CONNACK's word).

    Raises:
        ChunkError: (peer) the broker accepts too little to be of use.
    """
    size = min(MAX_CHUNK_BYTES, max_packet_bytes - _PACKET_OVERHEAD_BYTES)
    if size < _MIN_PAYLOAD_BYTES:
        raise ChunkError(
            "the broker accepts no packet that could carry a chunk", limit_bytes=max_packet_bytes
        )
    return size


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk, parsed and in bounds; its piece is not verified until all are there.

    Attributes:
        transfer: SHA-256 of the whole message.
        piece_bytes: how long every piece but the last is.
    """

    transfer: bytes
    index: int
    total: int
    size_bytes: int
    piece_bytes: int
    piece: bytes


def chunk_count(size_bytes: int, max_payload: int) -> int:
    """How many chunks `split` makes of a message of so many bytes."""
    return -(-size_bytes // (max_payload - HEADER_BYTES))


def split(message: bytes, max_payload: int = MAX_CHUNK_BYTES) -> list[bytes]:
    """Cuts a message into chunks of at most `max_payload` bytes each, header included.

    Raises:
        ChunkError: (us) an empty message, a payload below 256 or above 120 KiB, or more than 4,096 chunks.
    """
    if not _MIN_PAYLOAD_BYTES <= max_payload <= MAX_CHUNK_BYTES:
        raise ChunkError("no such chunk size", size_bytes=max_payload, limit_bytes=MAX_CHUNK_BYTES)
    piece_bytes = max_payload - HEADER_BYTES
    total = chunk_count(len(message), max_payload)
    if not 1 <= total <= MAX_CHUNKS:
        raise ChunkError("message cannot be cut into chunks", size_bytes=len(message), total=total)
    transfer = sha256(message)
    view = memoryview(message)
    return [
        b"".join(
            (
                _HEADER.pack(_MAGIC, _VERSION, 0, index, total, len(message), transfer),
                view[index * piece_bytes : (index + 1) * piece_bytes],
            )
        )
        for index in range(total)
    ]


def parse(payload: bytes) -> Chunk:
    """Reads one chunk and checks all that it says about itself.

    Raises:
        ChunkError: (peer) not a chunk, or numbers that cannot belong together.
    """
    if not HEADER_BYTES < len(payload) <= MAX_CHUNK_BYTES:
        raise ChunkError("chunk has no possible length", size_bytes=len(payload))
    magic, version, flags, index, total, size, transfer = _HEADER.unpack_from(payload)
    if magic != _MAGIC or version != _VERSION or flags != 0:
        raise ChunkError("not a chunk of this version")
    if not 0 < total <= MAX_CHUNKS or index >= total or size < total:
        raise ChunkError("chunk's numbers are out of bounds", index=index, total=total, size_bytes=size)
    piece = payload[HEADER_BYTES:]
    piece_bytes = _piece_bytes(len(piece), index, total, size)
    if not 0 < piece_bytes <= MAX_CHUNK_BYTES - HEADER_BYTES or -(-size // piece_bytes) != total:
        raise ChunkError(
            "chunk's length does not fit its transfer", index=index, total=total, size_bytes=size
        )
    return Chunk(transfer, index, total, size, piece_bytes, piece)


def _piece_bytes(length: int, index: int, total: int, size: int) -> int:
    """How long the full pieces of a transfer are, told by one piece of `length`; 0 if that cannot be."""
    if index < total - 1:
        return length
    before = size - length
    if total == 1:
        return length if before == 0 else 0
    return before // (total - 1) if before >= 0 and before % (total - 1) == 0 else 0


@dataclass(slots=True)
class _Transfer:
    total: int
    size_bytes: int
    piece_bytes: int
    pieces: dict[int, bytes] = field(default_factory=dict)

    def is_of(self, chunk: Chunk) -> bool:
        mine = (self.total, self.size_bytes, self.piece_bytes)
        return mine == (chunk.total, chunk.size_bytes, chunk.piece_bytes)


class Reassembly:
    """The open transfers of ONE sender, inside one budget. Holds no clock: its owner drops what is too old.

    Across a restart nothing is kept: an owner that stores chunks adds them again, another asks for what is
    missing.
    """

    def __init__(self, limit_bytes: int, *, max_transfers: int = MAX_TRANSFERS) -> None:
        """Grants `limit_bytes` of message in all, and `max_transfers` messages at once."""
        self._limit_bytes = limit_bytes
        self._max_transfers = max_transfers
        self._transfers: dict[bytes, _Transfer] = {}

    @property
    def granted_bytes(self) -> int:
        """The sizes of the open transfers, which are never above the limit."""
        return sum(transfer.size_bytes for transfer in self._transfers.values())

    def transfers(self) -> tuple[bytes, ...]:
        """The open transfers, the one that was touched last at the end."""
        return tuple(self._transfers)

    def add(self, chunk: Chunk | bytes) -> bytes | None:
        """Takes one chunk (parsed or not); returns the whole message when it was the last one missing.

        A chunk that is there already is ignored. The same transfer cut differently starts over: its sender
        came back through a broker with other limits. When there is no room for a new transfer, the one that
        was touched least recently is given up; its sender is told what is missing when it asks.

        Raises:
            ChunkError: (peer) not a chunk, larger than was granted, or the message does not have the hash it
                claims (the transfer is given up then, because nothing tells which piece was wrong).
        """
        if isinstance(chunk, bytes):
            chunk = parse(chunk)
        transfer = self._open(chunk)
        transfer.pieces.setdefault(chunk.index, chunk.piece)
        if len(transfer.pieces) < transfer.total:
            return None
        del self._transfers[chunk.transfer]
        message = b"".join(transfer.pieces[index] for index in range(transfer.total))
        if sha256(message) != chunk.transfer:
            raise ChunkError("transfer does not have the hash it claims", size_bytes=len(message))
        return message

    def has(self, chunk: Chunk) -> bool:
        """Whether this piece of an open transfer is there already."""
        known = self._transfers.get(chunk.transfer)
        return known is not None and known.is_of(chunk) and chunk.index in known.pieces

    def missing(self, transfer: bytes) -> tuple[int, ...]:
        """The indices that an open transfer lacks, in order; empty for one that is not open."""
        known = self._transfers.get(transfer)
        if known is None:
            return ()
        return tuple(index for index in range(known.total) if index not in known.pieces)

    def drop(self, transfer: bytes) -> None:
        """Forgets a transfer, open or not."""
        self._transfers.pop(transfer, None)

    def _open(self, chunk: Chunk) -> _Transfer:
        known = self._transfers.pop(chunk.transfer, None)
        if known is None or not known.is_of(chunk):
            if chunk.size_bytes > self._limit_bytes:
                raise ChunkError(
                    "transfer is larger than was granted",
                    size_bytes=chunk.size_bytes,
                    limit_bytes=self._limit_bytes,
                )
            known = _Transfer(chunk.total, chunk.size_bytes, chunk.piece_bytes)
            self._make_room(chunk.size_bytes)
        # Taken out and put in again, so that the dictionary's order is the order of touching.
        self._transfers[chunk.transfer] = known
        return known

    def _make_room(self, size_bytes: int) -> None:
        while self._transfers and (
            len(self._transfers) >= self._max_transfers or self.granted_bytes + size_bytes > self._limit_bytes
        ):
            del self._transfers[next(iter(self._transfers))]
