"""Content-addressed bytes by broadcast: cut once, hashed chunk by chunk, gathered in any order from anywhere.

The reference travels in a signed message, so a chunk needs no signature: it is right or it is not. Laws of
the file: pure; nothing is kept that does not have the hash that the reference names; nothing is allocated
beyond `limit_bytes`.
Source: docs/protocol.md, clause 7.
"""

from __future__ import annotations

from wire.errors import ChunkError
from wire.messages import MAX_BODY_BYTES, MAX_CHUNKS, BlobRef
from wire.primitives import sha256

MIN_CHUNK_BYTES = 1024
MAX_CHUNK_BYTES = 122_880


def make_ref(data: bytes, chunk_bytes: int = MAX_CHUNK_BYTES) -> tuple[BlobRef, list[bytes]]:
    """Cuts `data` and names every piece; returns the reference and the chunks as they are published.

    Raises:
        ChunkError: (us) chunks below 1 KiB or above 120 KiB, or too many of them.
    """
    if not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise ChunkError("no such chunk size", size_bytes=chunk_bytes, limit_bytes=MAX_CHUNK_BYTES)
    if len(data) > MAX_BODY_BYTES or len(data) > chunk_bytes * MAX_CHUNKS:
        raise ChunkError("blob is too large to be broadcast", size_bytes=len(data))
    chunks = [data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes)]
    ref = BlobRef(
        sha256=sha256(data),
        size_bytes=len(data),
        chunk_bytes=chunk_bytes,
        chunk_sha256=tuple(sha256(chunk) for chunk in chunks),
    )
    return ref, chunks


class BlobAssembly:
    """One blob that is being gathered. A device that restarts adds the chunks it kept and asks for the
    rest."""

    def __init__(self, ref: BlobRef, *, limit_bytes: int = MAX_BODY_BYTES) -> None:
        """Starts with nothing.

        Raises:
            ChunkError: (peer) larger than `limit_bytes`, or a reference whose numbers do not belong together.
        """
        if ref.size_bytes > limit_bytes:
            raise ChunkError(
                "blob is larger than allowed", size_bytes=ref.size_bytes, limit_bytes=limit_bytes
            )
        if len(ref.chunk_sha256) != -(-ref.size_bytes // ref.chunk_bytes):
            raise ChunkError("blob has another number of chunks than its size asks for")
        self._ref = ref
        self._chunks: dict[int, bytes] = {}

    @property
    def ref(self) -> BlobRef:
        return self._ref

    @property
    def total(self) -> int:
        """How many chunks the blob has."""
        return len(self._ref.chunk_sha256)

    @property
    def is_complete(self) -> bool:
        return len(self._chunks) == self.total

    def add(self, index: int, chunk: bytes) -> bool:
        """Takes one chunk; returns whether it was new.

        Raises:
            ChunkError: (peer) no such index, or not the bytes that the reference names.
        """
        if not 0 <= index < self.total:
            raise ChunkError("blob has no such chunk", index=index, total=self.total)
        if index in self._chunks:
            return False
        if sha256(chunk) != self._ref.chunk_sha256[index]:
            raise ChunkError("chunk is not the one that the blob names", index=index)
        self._chunks[index] = bytes(chunk)
        return True

    def missing(self) -> tuple[int, ...]:
        """The indices still to come, in order."""
        return tuple(index for index in range(self.total) if index not in self._chunks)

    def need_bitmap(self) -> bytes:
        """The same as `Need.bitmap`: bit i (LSB first) is set if chunk i is missing; one zero byte if none
        is."""
        bitmap = bytearray(max(1, -(-self.total // 8)))
        for index in self.missing():
            bitmap[index // 8] |= 1 << index % 8
        return bytes(bitmap)

    def result(self) -> bytes:
        """The blob.

        Raises:
            ChunkError: (us) chunks are missing; (peer) the reference's chunks do not make the blob that it
                names.
        """
        if not self.is_complete:
            raise ChunkError("blob is not complete", missing=len(self.missing()))
        data = b"".join(self._chunks[index] for index in range(self.total))
        if len(data) != self._ref.size_bytes or sha256(data) != self._ref.sha256:
            raise ChunkError("blob does not have the hash that its reference names")
        return data


def needed_chunks(bitmap: bytes, total: int) -> tuple[int, ...]:
    """Reads `Need.bitmap` of a blob of `total` chunks.

    Raises:
        ChunkError: (peer) the bitmap is not as long as `total` asks for, or names chunks that do not exist.
    """
    if len(bitmap) != max(1, -(-total // 8)):
        raise ChunkError("bitmap is not as long as its blob asks for", size_bytes=len(bitmap), total=total)
    bits = int.from_bytes(bitmap, "little")
    if bits >> total:
        raise ChunkError("bitmap names chunks that do not exist", total=total)
    return tuple(index for index in range(total) if bits >> index & 1)
