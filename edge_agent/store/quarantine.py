"""A capped folder for what was found damaged: kept for a person to look at, never read again by the agent.

Laws of the file: keeping is best effort and never raises (a full disk must not turn damage into a crash); the folder
never grows above its cap, the oldest goes first; what may hold the device's data is sealed before it lies here, in
records that are bound to their file and place. Source: docs/architecture.md, "The agent", "Data at rest".
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from edge_agent.store.at_rest import KEY_ID_CHARACTERS, Vault, bound
from edge_agent.store.disk import make_private_folder, shred
from edge_agent.store.key_store import SEALED_EXTRA_BYTES
from wire.errors import StorageError
from wire.primitives import random_bytes

FOLDER_NAME: Final = "quarantine"
MAX_QUARANTINE_BYTES = 16 * 1024 * 1024
REASON_SUFFIX: Final = ".reason"
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_MAGIC: Final = b"SHOALQ1\0"
_FILE_ID_BYTES: Final = 16
_HEAD_BYTES: Final = len(_MAGIC) + KEY_ID_CHARACTERS + _FILE_ID_BYTES
_RECORD_BYTES: Final = 65_536
_PARTIAL: Final = ".partial"


class Quarantine:
    """`quarantine/` of one device. Entries are `{serial}-{name}` beside `{serial}-{name}.reason`.

    Args:
        folder: made at the first entry; None keeps nothing (a simulated device has no disk).
        max_bytes: cap over all entries; what is larger by itself is thrown away, its reason stays.
        vault: seals what is kept; None for what is no secret (files of releases).
    """

    def __init__(
        self, folder: Path | None, *, max_bytes: int = MAX_QUARANTINE_BYTES, vault: Vault | None = None
    ) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._vault = vault
        self.kept_total = 0

    def take(self, path: Path, reason: str) -> None:
        """Moves a file or folder away from where it stands; gone from there even if it cannot be kept."""
        self.kept_total += 1
        with contextlib.suppress(OSError, StorageError):
            target = self._new_entry(path.name, reason)
            if target is not None and _size_bytes(path) <= self._max_bytes:
                if self._vault is None:
                    os.replace(path, target)
                else:
                    self._seal_tree(self._vault, path, target)
        _remove(path)
        self._trim()

    def keep(self, name: str, data: bytes, reason: str) -> None:
        """Writes bytes that were found damaged (a database row, a download)."""
        self.kept_total += 1
        with contextlib.suppress(OSError, StorageError):
            target = self._new_entry(name, reason)
            if target is not None and len(data) <= self._max_bytes:
                with _new_file(target) as file:
                    if self._vault is None:
                        file.write(data)
                    else:
                        _seal_stream(self._vault, io.BytesIO(data), len(data), file)
        self._trim()

    def entries(self) -> list[tuple[str, int, str]]:
        """What is here, the oldest first: (name, bytes on disk, reason)."""
        if self.folder is None or not self.folder.is_dir():
            return []
        found = []
        for reason in sorted(self.folder.glob(f"*{REASON_SUFFIX}")):
            entry = reason.with_name(reason.name.removesuffix(REASON_SUFFIX))
            size = _size_bytes(entry) if entry.exists() else 0
            found.append((entry.name, size, reason.read_text(encoding="utf-8", errors="replace").strip()))
        return found

    def read(self, name: str) -> bytes:
        """An entry, or a file of one (`entry/file`), as it was before it was sealed.

        Raises:
            StorageError: there is none of this name, its key was destroyed, or it was damaged here, too.
        """
        if self.folder is None or _UNSAFE.search(name.replace("/", "")) or ".." in name:
            raise StorageError(f"nothing of the name {name!r} is in quarantine")
        try:
            with (self.folder / name).open("rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    return (self.folder / name).read_bytes()
                if self._vault is None:
                    raise StorageError(f"{name} is sealed, and its keys are not here")
                return b"".join(_opened(self._vault, file))
        except OSError as error:
            raise StorageError(f"cannot read {name}: {error.strerror}") from error

    def seal_plain(self) -> None:
        """Seals what an earlier version kept in the clear."""
        if self.folder is None or self._vault is None or not self.folder.is_dir():
            return
        with contextlib.suppress(OSError, StorageError):
            self.folder.chmod(0o700)
            for path in list(_files(self.folder)):
                path.chmod(0o600)
                if path.name.endswith(_PARTIAL):
                    shred(path)
                elif path.suffix != REASON_SUFFIX and not _is_sealed(path):
                    self._seal_file(self._vault, path, path)

    def empty(self) -> None:
        """Overwrites and removes all that is here.

        Raises:
            StorageError: something may still be here.
        """
        if self.folder is None or not self.folder.is_dir():
            return
        for path in list(_files(self.folder)):
            shred(path)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _seal_tree(self, vault: Vault, path: Path, target: Path) -> None:
        if not path.is_dir() or path.is_symlink():
            self._seal_file(vault, path, target)
            return
        for file in list(_files(path)):
            place = target / file.relative_to(path)
            make_private_folder(place.parent)
            self._seal_file(vault, file, place)

    @staticmethod
    def _seal_file(vault: Vault, path: Path, target: Path) -> None:
        """Whole or not at all; what lay in the clear is overwritten."""
        partial = target.with_name(target.name + _PARTIAL)
        with path.open("rb") as source, _new_file(partial) as file:
            _seal_stream(vault, source, os.fstat(source.fileno()).st_size, file)
            file.flush()
            os.fsync(file.fileno())
        if path != target:
            os.replace(partial, target)
            shred(path)
            return
        plain = path.with_name(path.name + ".plain" + _PARTIAL)
        os.replace(path, plain)
        os.replace(partial, target)
        shred(plain)

    def _new_entry(self, name: str, reason: str) -> Path | None:
        if self.folder is None:
            return None
        make_private_folder(self.folder)
        serial = 1 + max((_serial(path) for path in self.folder.iterdir()), default=0)
        target = self.folder / f"{serial:08d}-{_UNSAFE.sub('_', name)[:100]}"
        with _new_file(target.with_name(target.name + REASON_SUFFIX)) as file:
            file.write(f"{reason[:1000]}\n".encode())
        return target

    def _trim(self) -> None:
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            entries = sorted(self.folder.iterdir())
            size_bytes = sum(_size_bytes(path) for path in entries)
            for path in entries:
                if size_bytes <= self._max_bytes:
                    return
                size_bytes -= _size_bytes(path)
                _remove(path)


def _seal_stream(vault: Vault, source: BinaryIO, size_bytes: int, target: BinaryIO) -> None:
    """Head (mark, key id, an id of this file), then records; the last one says so, so that none can be cut off."""
    file_id = random_bytes(_FILE_ID_BYTES)
    records = max(1, -(-size_bytes // _RECORD_BYTES))
    key = ""
    for index in range(records):
        record = source.read(_RECORD_BYTES)
        place = _place(file_id, index, is_last=index == records - 1)
        if key:
            sealed = vault.seal_with(key, place, record)
        else:
            key, sealed = vault.seal("quarantine", place, record)
            target.write(_MAGIC + key.encode("ascii") + file_id)
        target.write(sealed)


def _opened(vault: Vault, file: BinaryIO) -> Iterator[bytes]:
    """The records of a sealed file, from behind its mark.

    Raises:
        StorageError: one does not open, or the last is missing.
    """
    size_bytes = os.fstat(file.fileno()).st_size - _HEAD_BYTES
    key = file.read(KEY_ID_CHARACTERS).decode("ascii", "replace")
    file_id = file.read(_FILE_ID_BYTES)
    stride = _RECORD_BYTES + SEALED_EXTRA_BYTES
    records = max(1, -(-size_bytes // stride))
    for index in range(records):
        place = _place(file_id, index, is_last=index == records - 1)
        yield vault.open("quarantine", key, place, file.read(stride))


def _place(file_id: bytes, index: int, *, is_last: bool) -> bytes:
    return bound(file_id, struct.pack("<Q?", index, is_last))


def _new_file(path: Path) -> BinaryIO:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "wb")


def _is_sealed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _serial(path: Path) -> int:
    digits = path.name.split("-", 1)[0]
    return int(digits) if digits.isdecimal() else 0


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        yield from (item for item in path.rglob("*") if item.is_file() and not item.is_symlink())
    else:
        yield path


def _size_bytes(path: Path) -> int:
    return sum(item.stat().st_size for item in _files(path))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
