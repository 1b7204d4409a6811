"""Writing files so that a power cut leaves the old content or the new one, never half of it.

Laws of the file: a name becomes visible only after its content is on disk (write, fsync, rename, fsync of the
folder); what is written is its owner's alone, whatever the umask. Overwriting before a file goes is all that a program
can do: a flash card, a journal or a snapshot may keep the old blocks.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from wire.errors import StorageError

_ZEROS: Final = bytes(65_536)


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Writes a whole file so that a crash leaves the old one or the new one: write, fsync, rename, fsync
    folder.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # a file that a crash left may have another
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror}", size_bytes=len(data)) from error


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_opener(path: str, flags: int) -> int:
    """For `open(…, opener=private_opener)`: what is made is its owner's alone, whatever the umask."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def make_private_folder(folder: Path) -> None:
    """Makes a folder that only its owner may enter, and sees to it that one which is there is such.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror}") from error


def replace_and_shred(path: Path, data: bytes) -> None:
    """As `write_durably`, and the content before is overwritten where it lay.

    Raises:
        StorageError: the disk is full or the folder cannot be written; the old content stays.
    """
    try:
        before = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        write_durably(path, data)
        return
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    try:
        write_durably(path, data)
        with contextlib.suppress(OSError):
            _overwrite(before)
    finally:
        os.close(before)


def shred(path: Path) -> None:
    """Overwrites a file with zeros and removes it; nothing happens when there is none.

    A disk that cannot overwrite (it writes elsewhere, and is full) still removes.

    Raises:
        StorageError: it may still be there.
    """
    try:
        with contextlib.suppress(OSError):
            overwrite(path)
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot remove {path}: {error.strerror}") from error


def overwrite(path: Path) -> None:
    """Overwrites a file with zeros where it lies; nothing happens when there is none.

    Raises:
        OSError: it cannot be written.
    """
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _overwrite(descriptor)
        finally:
            os.close(descriptor)


def _overwrite(descriptor: int) -> None:
    left = os.fstat(descriptor).st_size
    os.lseek(descriptor, 0, os.SEEK_SET)
    while left > 0:
        left -= os.write(descriptor, _ZEROS[: min(left, len(_ZEROS))])
    os.fsync(descriptor)
