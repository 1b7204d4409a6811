"""Chunks of large updates on the disk, so that a restart of the aggregator does not ask a slow link for them again.

One file a transfer: what the transfer is, then records that are only appended, each with the SHA-256 of its piece.
Laws of the file: nothing here is believed, what comes together is verified like what came just now; a record that a
crash tore is left out; bytes and age are bounded, and the transfer that was touched least recently goes first; a disk
that is full or gone costs only the memory of a restart. Source: docs/protocol.md, clause 6.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from process.clock import Clock
from process.logs import get_logger
from wire.chunks import Chunk

_log = get_logger("cloud.inbox")

LIMIT_BYTES: Final = 1024 * 1024 * 1024
MAX_AGE_SECONDS: Final = 86_400.0
FROM_CHUNKS: Final = 4
"""A transfer of fewer is sent again as soon as it is asked for."""
_SWEEP_SECONDS: Final = 600.0
_HEAD: Final = struct.Struct(">4sIQI")  # magic, total, size, length of a full piece
_RECORD: Final = struct.Struct(">II32s")  # index, length, SHA-256
_MAGIC: Final = b"SCP1"
_MAX_FILES: Final = 4096
_ENDING: Final = ".part"


class Partials:
    """The open transfers of a fleet. Used from the aggregator's thread only.

    Args:
        folder: made if absent; what lies there from before counts.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        *,
        limit_bytes: int = LIMIT_BYTES,
        max_age_seconds: float = MAX_AGE_SECONDS,
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._limit_bytes = limit_bytes
        self._max_age_seconds = max_age_seconds
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._bytes = 0
        self._next_sweep = 0.0
        self._has_complained = False
        self._scan()

    @property
    def kept_bytes(self) -> int:
        """On the disk."""
        return self._bytes

    def keep(self, device: str, chunk: Chunk) -> None:
        """Appends a chunk that is not there yet."""
        if chunk.total < FROM_CHUNKS:
            return
        name = _name(device, chunk.transfer)
        record = (
            _RECORD.pack(chunk.index, len(chunk.piece), hashlib.sha256(chunk.piece).digest()) + chunk.piece
        )
        if name not in self._sizes:
            record = _HEAD.pack(_MAGIC, chunk.total, chunk.size_bytes, chunk.piece_bytes) + record
        self._make_room(len(record))
        try:
            with (self._folder / name).open("ab") as file:
                file.write(record)
        except OSError as error:
            if not self._has_complained:
                self._has_complained = True
                _log.warning("partial_updates_not_kept", error=error.strerror or str(error))
            self.forget(device, chunk.transfer)
            return
        self._has_complained = False
        self._sizes[name] = self._sizes.pop(name, 0) + len(record)
        self._bytes += len(record)

    def restore(self, device: str, transfer: bytes) -> Iterator[Chunk]:
        """The chunks of a transfer that came before a restart; those that the disk lost are left out."""
        name = _name(device, transfer)
        if name not in self._sizes:
            return
        try:
            data = memoryview((self._folder / name).read_bytes())
        except OSError:
            self._drop(name)
            return
        if len(data) < _HEAD.size:
            return
        magic, total, size, piece_bytes = _HEAD.unpack_from(data)
        place = _HEAD.size
        while magic == _MAGIC and len(data) - place >= _RECORD.size:
            index, length, digest = _RECORD.unpack_from(data, place)
            place += _RECORD.size
            piece = bytes(data[place : place + length])
            place += length
            if hashlib.sha256(piece).digest() != digest:
                return  # torn: what follows it cannot be found
            yield Chunk(transfer, index, total, size, piece_bytes, piece)

    def forget(self, device: str, transfer: bytes) -> None:
        """Drops a transfer, there or not."""
        self._drop(_name(device, transfer))

    def sweep(self) -> None:
        """Drops what is too old; cheap when it was done just now."""
        now = self._clock.now()
        if now < self._next_sweep and self._next_sweep - now <= _SWEEP_SECONDS:
            return
        self._next_sweep = now + _SWEEP_SECONDS
        for name in list(self._sizes):
            try:
                age = now - (self._folder / name).stat().st_mtime
            except OSError:
                age = self._max_age_seconds
            if age >= self._max_age_seconds:
                self._drop(name)

    def _scan(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = [(path.stat(), path.name) for path in self._folder.glob(f"*{_ENDING}")]
        except OSError as error:
            _log.warning("partial_updates_not_kept", error=error.strerror or str(error))
            return
        for stat, name in sorted(found, key=lambda each: each[0].st_mtime):
            self._sizes[name] = stat.st_size
            self._bytes += stat.st_size

    def _make_room(self, needed_bytes: int) -> None:
        while self._sizes and (
            self._bytes + needed_bytes > self._limit_bytes or len(self._sizes) > _MAX_FILES
        ):
            self._drop(next(iter(self._sizes)))

    def _drop(self, name: str) -> None:
        if name in self._sizes:
            self._bytes -= self._sizes.pop(name)
            try:
                (self._folder / name).unlink(missing_ok=True)
            except OSError as error:
                _log.warning("partial_update_stays", file=name, error=error.strerror or str(error))


def _name(device: str, transfer: bytes) -> str:
    """`device` is an id of a topic, and so a file name that hurts nobody."""
    return f"{device}.{transfer.hex()}{_ENDING}"
