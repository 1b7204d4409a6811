"""Chunks of heads on the disk, so that a restart of the agent does not ask its link for them again.

One file a blob, each chunk where it belongs. There is no list of what is in it: the hashes in the signed invitation
say which chunks are whole, whatever a crash left. Laws of the file: nothing is read that does not have its hash;
bytes, number and age are bounded, and the oldest goes first; a disk that is full or gone costs only the memory of a
restart. Source: docs/protocol.md, clause 7.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from process.clock import Clock
from process.logs import get_logger
from wire.messages import BlobRef
from wire.primitives import sha256

_log = get_logger("edge_agent.rounds.heads")

FROM_BYTES: Final = 64 * 1024
"""A smaller blob is asked for again in a message or two."""
MAX_FILES: Final = 4
MAX_AGE_SECONDS: Final = 3 * 86_400.0
_ENDING: Final = ".blob"


class KeptChunks(Protocol):
    """Where chunks outlive the process."""

    def read(self, ref: BlobRef) -> Iterator[tuple[int, bytes]]:
        """The chunks of a blob that are here, each with the hash that `ref` names."""
        ...

    def put(self, ref: BlobRef, index: int, chunk: bytes) -> None:
        """Keeps one chunk, which was verified."""
        ...

    def drop(self, sha256: bytes) -> None:
        """Forgets a blob, there or not."""
        ...


class NoChunks:
    """Of a simulated device: a restart begins anew."""

    def read(self, ref: BlobRef) -> Iterator[tuple[int, bytes]]:
        yield from ()

    def put(self, ref: BlobRef, index: int, chunk: bytes) -> None:
        """Nothing is kept."""

    def drop(self, sha256: bytes) -> None:
        """Nothing was kept."""


class FolderChunks:
    """In a folder. Used from the agent's loop only.

    Args:
        folder: made when something is kept.
        max_bytes: of all files together.
    """

    def __init__(self, folder: Path, clock: Clock, *, max_bytes: int) -> None:
        self._folder = folder
        self._clock = clock
        self._max_bytes = max_bytes
        self._has_complained = False

    def read(self, ref: BlobRef) -> Iterator[tuple[int, bytes]]:
        place = self._place(ref.sha256)
        if ref.size_bytes < FROM_BYTES or not place.exists():
            return
        with contextlib.suppress(OSError), place.open("rb") as file:
            for index, wanted in enumerate(ref.chunk_sha256):
                chunk = file.read(min(ref.chunk_bytes, ref.size_bytes - index * ref.chunk_bytes))
                if sha256(chunk) == wanted:
                    yield index, chunk

    def put(self, ref: BlobRef, index: int, chunk: bytes) -> None:
        if ref.size_bytes < FROM_BYTES:
            return
        place = self._place(ref.sha256)
        try:
            if not place.exists():
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._make_room(ref.size_bytes)
            descriptor = os.open(place, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(descriptor, chunk, index * ref.chunk_bytes)
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._has_complained:
                self._has_complained = True
                _log.warning("heads_not_kept", reason=error.strerror or str(error))
            self.drop(ref.sha256)
            return
        self._has_complained = False

    def drop(self, sha256: bytes) -> None:
        with contextlib.suppress(OSError):
            self._place(sha256).unlink(missing_ok=True)

    def _place(self, sha256: bytes) -> Path:
        return self._folder / f"{sha256.hex()}{_ENDING}"

    def _make_room(self, needed_bytes: int) -> None:
        """Drops what is too old, and the oldest until the new one fits."""
        found = sorted(
            ((path.stat(), path) for path in self._folder.glob(f"*{_ENDING}")),
            key=lambda each: each[0].st_mtime,
        )
        kept = sum(stat.st_size for stat, _ in found)
        for number, (stat, path) in enumerate(found):
            is_old = self._clock.now() - stat.st_mtime > MAX_AGE_SECONDS
            if is_old or kept + needed_bytes > self._max_bytes or len(found) - number >= MAX_FILES:
                path.unlink(missing_ok=True)
                kept -= stat.st_size
