"""Writing files so that a power cut leaves the old content or the new one, never half of it.

Law of the file: a name becomes visible only after its content is on disk (write, fsync, rename, fsync of the
folder).
"""

from __future__ import annotations

import os
from pathlib import Path

from wire.errors import StorageError


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
