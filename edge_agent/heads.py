"""The heads of rounds on their way in: chunks by broadcast, checked one by one against a signed reference.

Laws of the file: nothing is kept that no invitation asked for; memory is bounded by the largest head allowed
and the few that the state machine holds at a time.
"""

from __future__ import annotations

from wire.blobs import BlobAssembly
from wire.errors import ChunkError
from wire.messages import BlobRef, Need


class Heads:
    """Blobs that are being gathered, or are complete and wait for their job."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._gathering: dict[bytes, BlobAssembly] = {}
        self._complete: dict[bytes, bytes] = {}

    def gather(self, ref: BlobRef) -> None:
        """Makes room for a blob.

        Raises:
            ChunkError: (peer) larger than this device accepts, or a reference that contradicts itself.
        """
        if ref.sha256 not in self._complete and ref.sha256 not in self._gathering:
            self._gathering[ref.sha256] = BlobAssembly(ref, limit_bytes=self._max_bytes)

    def add(self, sha256: bytes, index: int, piece: bytes) -> tuple[bool, bool]:
        """Takes a piece; returns whether it was new and whether the blob is complete now.

        A piece of a blob that nobody asked for is dropped without a word: the broker sends every device all
            of them.

        Raises:
            ChunkError: (peer) no such piece, or not the bytes that the reference names.
        """
        assembly = self._gathering.get(sha256)
        if assembly is None or not assembly.add(index, piece):
            return False, False
        if assembly.is_complete:
            del self._gathering[sha256]
            self._complete[sha256] = assembly.result()
        return True, assembly.is_complete

    def need(self, sha256: bytes) -> Need | None:
        """What is still missing, or None when the blob is not being gathered."""
        assembly = self._gathering.get(sha256)
        return Need(sha256=sha256, bitmap=assembly.need_bitmap()) if assembly is not None else None

    def read(self, sha256: bytes) -> bytes:
        """A complete blob.

        Raises:
            ChunkError: (us) it is not complete.
        """
        data = self._complete.get(sha256)
        if data is None:
            raise ChunkError("the head is not complete")
        return data

    def drop(self, sha256: bytes) -> None:
        """Forgets a blob, complete or not."""
        self._gathering.pop(sha256, None)
        self._complete.pop(sha256, None)
