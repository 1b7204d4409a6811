"""The file of a backup: a tar of plain files, the last of which lists all others with their hashes.

Laws of the file: it is 0600 and whole or not there; what is read is believed only as far as the list's hashes go,
and only plain files with names of ours are written, each once and never outside of the folder (a backup comes from
somewhere else than where it was made). Whoever can write the backup can also write its list: it tells damage, not
theft. Keep backups encrypted, where the keys would be kept.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, BinaryIO, Final

import msgspec
from msgspec import Meta, Struct

from wire.errors import ConfigurationError, StorageError

LIST: Final = "BACKUP.json"
FORMAT: Final = "shoal-backup 1"
MAX_LIST_BYTES: Final = 256 * 2**20
_BLOCK: Final = 1 << 20
_NAME: Final = re.compile(r"(?!\.)[A-Za-z0-9._-]+(?:/(?!\.\.?/)[A-Za-z0-9._-]+){0,31}")


class Item(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file."""

    size_bytes: Annotated[int, Meta(ge=0)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Listing(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a backup is of.

    Attributes:
        artefacts: where artefacts are that are not in it (a URL); empty: they are in it.
        incarnation, audit_entries: of the database that was copied.
    """

    format: str
    tenant: str
    fleet: str
    created: float
    incarnation: int
    audit_entries: int
    artefacts: str
    files: dict[str, Item]


class ArchiveWriter:
    """Writes a backup into a new file. A context manager: the file is there only when the block ends well and `finish`
    was called.

    Raises:
        ConfigurationError: (operator) the file is there already.
        StorageError: (disk) it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise ConfigurationError(
                f"{path} is there already", hint="name another file: nothing is overwritten"
            )
        self._path = path
        self._partial = path.with_name(f".{path.name}.part")
        self._files: dict[str, Item] = {}
        try:
            descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}", path=str(path)) from error
        self._file = os.fdopen(descriptor, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, name: str, source: Path) -> None:
        """Copies a file."""
        try:
            with source.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                hashed = _Hashed(file, size)
                self._tar.addfile(_member(name, size), hashed)
        except OSError as error:
            raise StorageError(f"{source} cannot be copied: {error.strerror or error}") from error
        self._files[name] = Item(size_bytes=size, sha256=hashed.sha256)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._files)

    def finish(self, listing: Listing) -> None:
        """Adds the list, and puts the file in its place, durably."""
        data = msgspec.json.encode(msgspec.structs.replace(listing, files=self._files))
        try:
            self._tar.addfile(_member(LIST, len(data)), io.BytesIO(data))
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._partial.replace(self._path)
        except OSError as error:
            raise StorageError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


class _Hashed:
    """A file that is hashed as it is read, and not read further than it was long."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        self._digest.update(data)
        return data


def unpack(path: Path, folder: Path) -> Listing:
    """Brings every file of a backup into an empty folder.

    Raises:
        StorageError: (disk, or whoever kept it) it cannot be read, is damaged, or is no backup of ours.
    """
    found: dict[str, Item] = {}
    listing: Listing | None = None
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                data = tar.extractfile(member) if member.isreg() else None
                if data is None or listing is not None or not _NAME.fullmatch(member.name):
                    raise _damaged(path, f"it has a member {member.name[:80]!r}")
                if member.name == LIST:
                    if member.size > MAX_LIST_BYTES:
                        raise _damaged(path, "its list is too long")
                    listing = msgspec.json.decode(data.read(), type=Listing, strict=True)
                elif member.name in found:
                    raise _damaged(path, f"{member.name} is in it twice")
                else:
                    found[member.name] = _write(folder / member.name, data)
    except (tarfile.TarError, msgspec.MsgspecError, UnicodeDecodeError, EOFError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise StorageError(f"{path} cannot be brought back: {error.strerror or error}") from error
    if listing is None or listing.format != FORMAT:
        raise _damaged(path, "it has no list, or one of another version")
    for name in sorted({*found, *listing.files}):
        if found.get(name) != listing.files.get(name):
            raise _damaged(path, f"{name} is missing or changed")
    return listing


def _write(target: Path, data: IO[bytes]) -> Item:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        while piece := data.read(_BLOCK):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return Item(size_bytes=size, sha256=digest.hexdigest())


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """The plain files of a folder, by their path in it, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(folder).as_posix(), path


def _damaged(path: Path, why: str) -> StorageError:
    return StorageError(f"{path} is damaged, or no backup: {why}", hint="use another backup", path=str(path))
