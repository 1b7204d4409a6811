"""The heads of rounds on their way in: whole or as a patch on one that is here, chunk by chunk, by broadcast.

Laws of the file: nothing is kept that no signed invitation asked for; a head is complete only when its bytes have the
hash that the invitation names, whichever way they came, so a wrong patch costs a download and nothing else; memory is
bounded by the largest head allowed and the few that the state machine holds at a time. Source: docs/protocol.md,
clauses 7 and 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.release.files import SlotContents
from edge_agent.rounds.kept_heads import KeptChunks, NoChunks
from process.logs import get_logger
from wire.blobs import BlobAssembly
from wire.checkpoint import Checkpoint
from wire.errors import BundleError, ChunkError
from wire.manifest import CHECKPOINT
from wire.messages import BlobRef, HeadPatch, Invitation, Need
from wire.patch import apply_patch

_log = get_logger("edge_agent.rounds.heads")


@dataclass(frozen=True, slots=True)
class Progress:
    """A chunk was new: of which head, and whether that is complete now."""

    head_sha256: bytes
    is_complete: bool


@dataclass(frozen=True, slots=True)
class _Gathering:
    """One head on its way in; `patch` is None where all of it is."""

    head: BlobRef
    patch: HeadPatch | None
    assembly: BlobAssembly


class Heads:
    """Heads that are being gathered, or are complete and wait for their job.

    Args:
        max_bytes: the largest head that is taken.
        current: the installed release, whose checkpoint may be a head, or None.
        kept: where chunks outlive the process.
    """

    def __init__(
        self,
        max_bytes: int,
        current: Callable[[], SlotContents | None] = lambda: None,
        kept: KeptChunks | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._current = current
        self._kept: KeptChunks = kept or NoChunks()
        self._gathering: dict[bytes, _Gathering] = {}
        self._complete: dict[bytes, bytes] = {}

    def must_ask(self, invitation: Invitation) -> bool:
        """Whether a head will not come by itself: its chunks leave on need, and neither it nor the base of its patch
        is here."""
        patch = invitation.patch
        if not invitation.head_on_need or self._is_here(invitation.head.sha256):
            return False
        return patch is None or not self._is_here(patch.base_sha256)

    def gather(self, head: BlobRef, patch: HeadPatch | None = None) -> bool:
        """Makes room for a head, or takes it from the installed release; returns whether it is complete.

        Raises:
            ChunkError: (peer) larger than this device accepts, or a reference that contradicts itself.
        """
        if head.sha256 in self._complete:
            return True
        installed = self._installed(head.sha256)
        if installed is not None:
            self._gathering.pop(head.sha256, None)
            self._complete[head.sha256] = installed
            return True
        if head.sha256 in self._gathering:
            return False
        if self._resume(_Gathering(head, None, BlobAssembly(head, limit_bytes=self._max_bytes))):
            return True
        if patch is not None and not self._is_here(patch.base_sha256):
            patch = None
        blob = patch.blob if patch is not None else head
        assembly = BlobAssembly(blob, limit_bytes=self._max_bytes)
        one = self._gathering[head.sha256] = _Gathering(head, patch, assembly)
        return self._resume(one)

    def add(self, sha256: bytes, index: int, piece: bytes) -> Progress | None:
        """Takes a piece of a blob; None when it brings nothing.

        A piece of a blob that nobody asked for is dropped without a word: the broker sends every device all of them.

        Raises:
            ChunkError: (peer) no such piece, or not the bytes that the reference names.
        """
        one = next((one for one in self._gathering.values() if one.assembly.ref.sha256 == sha256), None)
        if one is None or not one.assembly.add(index, piece):
            return None
        self._kept.put(one.assembly.ref, index, piece)
        if not one.assembly.is_complete:
            return Progress(one.head.sha256, False)
        return Progress(one.head.sha256, self._end(one))

    def need(self, head_sha256: bytes) -> Need | None:
        """What is still missing of a head or of its patch, or None when it is not being gathered."""
        one = self._gathering.get(head_sha256)
        if one is None:
            return None
        return Need(sha256=one.assembly.ref.sha256, bitmap=one.assembly.need_bitmap())

    def read(self, sha256: bytes) -> bytes:
        """A complete head.

        Raises:
            ChunkError: (us) it is not complete.
        """
        data = self._complete.get(sha256)
        if data is None:
            raise ChunkError("the head is not complete")
        return data

    def complete(self) -> dict[str, bytes]:
        """The complete heads by their SHA-256 (hex), as they are now."""
        return {sha256.hex(): data for sha256, data in self._complete.items()}

    def drop(self, sha256: bytes) -> None:
        """Forgets a head, complete or not."""
        self._gathering.pop(sha256, None)
        self._complete.pop(sha256, None)
        self._kept.drop(sha256)

    def _resume(self, one: _Gathering) -> bool:
        """Takes what an earlier life of the process gathered; returns whether the head is complete with it."""
        for index, piece in self._kept.read(one.assembly.ref):
            one.assembly.add(index, piece)
        return one.assembly.is_complete and self._end(one)

    def _end(self, one: _Gathering) -> bool:
        """All chunks are here; False when a patch did not lead to its head, which is then gathered whole."""
        sha256, data = one.head.sha256, one.assembly.result()
        if one.patch is not None:
            self._kept.drop(one.patch.blob.sha256)
            try:
                data = self._patched(one.patch, data, sha256)
                self._keep_whole(one.head, data)
            except BundleError as error:
                _log.warning("head_patch_refused", head=sha256.hex(), reason=str(error))
                whole = BlobAssembly(one.head, limit_bytes=self._max_bytes)
                self._gathering[sha256] = _Gathering(one.head, None, whole)
                return False
        self._gathering.pop(sha256, None)
        self._complete[sha256] = data
        return True

    def _keep_whole(self, ref: BlobRef, data: bytes) -> None:
        """A head that was made from a patch is the base of the next one, also after a restart."""
        for index in range(len(ref.chunk_sha256)):
            self._kept.put(ref, index, data[index * ref.chunk_bytes : (index + 1) * ref.chunk_bytes])

    def _patched(self, patch: HeadPatch, data: bytes, head_sha256: bytes) -> bytes:
        base = self._complete.get(patch.base_sha256) or self._installed(patch.base_sha256)
        if base is None:
            raise BundleError("patch: its base is not here any more")
        # What is complete has the hash that it is kept under, and what is installed was checked when it was read.
        old = Checkpoint.from_bytes(base, sha256=patch.base_sha256)
        head = apply_patch(old, data, limit_bytes=self._max_bytes)
        if head.sha256 != head_sha256:
            raise BundleError("patch: it leads to another head than the one that was signed for")
        return head.to_bytes()

    def _is_here(self, sha256: bytes) -> bool:
        if sha256 in self._complete:
            return True
        contents = self._current()
        return contents is not None and contents.release.checkpoint_sha256 == sha256.hex()

    def _installed(self, sha256: bytes) -> bytes | None:
        """The installed release's checkpoint, if it is that one and whole."""
        contents = self._current()
        if contents is None or contents.release.checkpoint_sha256 != sha256.hex():
            return None
        try:
            return contents.read(CHECKPOINT)
        except BundleError as error:
            _log.warning("release_checkpoint_unusable", version=contents.version, reason=str(error))
            return None
