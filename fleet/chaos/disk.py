"""One node's disk: a folder of real files, the points at which the node may die, and what it then finds again.

Laws of the file: the node's code sees a real folder; every commit of its databases, and every opening for writing,
rename, removal and sync of its files is a point; a dead node changes nothing any more (its code still unwinds); what
was not synced may be torn or gone after a power cut, and is there after a mere kill. Directory entries are kept in the
order they were made, as journalling file systems do. Source: docs/architecture.md, "The simulation under faults".
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleet.chaos.faults import Fault
from fleet.chaos.injector import Crash, Injector
from fleet.chaos.sqlite import (
    WAL_HEADER_BYTES,
    Change,
    CuttableConnection,
    disk_full,
    lose_unsynced,
    read_database,
    torn_commit,
    write_database,
)

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

NamePoint = Callable[[frozenset[Change]], str]
Committed = Callable[[CuttableConnection, frozenset[Change]], None]

_WRITES = os.O_WRONLY | os.O_RDWR
_OF_SQLITE = (".db", ".db-wal", ".db-shm", ".db-journal")


@dataclass(frozen=True, slots=True)
class _Synced:
    """A database at the last sync of its log: a checksum of its pages, and the header and length of its log."""

    pages: int
    header: bytes
    log_bytes: int

    def what_is_left(self, image: tuple[bytes, bytes], rng: random.Random) -> tuple[bytes, bytes]:
        if zlib.crc32(image[0]) != self.pages:
            return image  # a checkpoint came, which begins with a sync of the log
        is_same = image[1][:WAL_HEADER_BYTES] == self.header
        return lose_unsynced(image, self.log_bytes if is_same else WAL_HEADER_BYTES, rng)


class Disk:
    """The disk of one node.

    Args:
        name: of the node, for the trace.
        folder: on a file system in memory, where a sync costs nothing.
        database: name of the database in it.
        name_commit: the point of a commit, by what it changes; empty for one that is no point.
        name_file: point of an operation (`write`, `rename`, `remove`, `sync`) on a file; empty for none.
        committed: told of every commit that is through.
        here: called with every point that is passed, before anything strikes.

    Attributes:
        is_quiet: nothing strikes: whoever acts now is not the node's present life.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        injector: Injector,
        *,
        database: str,
        name_commit: NamePoint,
        name_file: Callable[[str, Path], str],
        committed: Committed,
        here: Callable[[str], None] = lambda point: None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.database = folder / database
        self._injector = injector
        self._name_commit = name_commit
        self._name_file = name_file
        self._committed = committed
        self._here = here
        self._connections: list[CuttableConnection] = []
        self._image: tuple[bytes, bytes] | None = None
        self._synced: _Synced | None = None
        self._unsynced: set[str] = set()
        self.is_dead = False
        self.is_quiet = False
        self.life = 1

    def is_of(self, life: int) -> bool:
        """Whether this life is the present one, and has not ended."""
        return not self.is_dead and self.life == life

    # ---- the node's own use ------------------------------------------------------------------------------------

    def connect(self, database: str | Path, *, owner: object = None, **options: Any) -> CuttableConnection:
        """In the place of `sqlite3.connect`.

        Args:
            owner: whose connection it is, where two processes share the disk.
        """
        self.check_alive()
        options.pop("factory", None)
        connection = CuttableConnection(self, database, owner=owner, **options)
        self._connections.append(connection)
        return connection

    def check_alive(self) -> None:
        """Raises `Crash` once this life has ended."""
        if self.is_dead:
            raise Crash(None)

    def pass_by(self, point: str) -> Fault | None:
        """A point of the node that is none of the disk's; the fault that strikes there."""
        self.check_alive()
        if self.is_quiet:
            return None
        self._here(point)
        return self._injector.visit(point, self.name)

    def commit(
        self, connection: CuttableConnection, changes: frozenset[Change], do: Callable[[], None]
    ) -> None:
        """See `CommitWatcher`."""
        if connection.path != self.database:
            do()
            return
        point = self._name_commit(changes) if changes else ""
        fault = self.pass_by(point) if point else None
        if fault is None:
            self._note_log(connection)
            do()
            self._committed(connection, changes)
            return
        if fault.kind == "crash_before":
            self.crash(fault)
        if fault.kind == "disk_full":
            raise disk_full()
        before = read_database(self.database)
        do()
        if fault.kind == "crash_torn":
            self.crash(fault, torn_commit(before, read_database(self.database), fault.rng()))
        self._committed(connection, changes)
        self.crash(fault)

    def touch(self, operation: str, path: Path) -> None:
        """An operation on a file, before it is done.

        Raises:
            OSError: the disk is full.
        """
        if path.name.endswith(_OF_SQLITE):
            return
        self.check_alive()
        point = self._name_file(operation, path)
        fault = self.pass_by(point) if point else None
        if operation == "write":
            self._unsynced.add(str(path))
        if fault is None:
            return
        if fault.kind == "disk_full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.crash(fault)

    def synced(self, path: str) -> None:
        """A file's content is safe."""
        self._unsynced.discard(path)

    def renamed(self, source: str, target: str) -> None:
        """What was not synced is not by another name either; what was there before has no name any more."""
        self._unsynced.discard(target)
        if source in self._unsynced:
            self._unsynced.discard(source)
            self._unsynced.add(target)

    # ---- dying and coming back ---------------------------------------------------------------------------------

    def crash(self, fault: Fault, image: tuple[bytes, bytes] | None = None) -> None:
        """Ends this life.

        Args:
            image: of the database, where the fault says what is left of it.

        Raises:
            Crash: always.
        """
        self.die(fault.rng(), image)
        raise Crash(fault)

    def die(self, rng: random.Random, image: tuple[bytes, bytes] | None = None) -> None:
        """Takes what will be found again; half of the crashes are power cuts."""
        is_power_cut = rng.random() < 0.5
        if image is None:
            image = read_database(self.database)
            if is_power_cut and self._synced is not None:
                image = self._synced.what_is_left(image, rng)
        if is_power_cut:
            self._tear_files(rng)
        self._image = image
        self.is_dead = True

    def come_back(self) -> None:
        """The folder as the next life finds it. Whatever the old life still held is let go first."""
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._unsynced.clear()
        self._synced = None
        if self._image is not None:
            write_database(self.database, self._image)
        self._image = None
        self.is_dead = False
        self.life += 1

    def rot(self, rng: random.Random) -> None:
        """Flips bits of the database while the node is down: a worn flash card."""
        if self._image is None:
            return
        pages = bytearray(self._image[0])
        start = rng.randrange(max(1, len(pages) // 4096)) * 4096
        for _ in range(8):
            if start < len(pages):
                pages[min(start + rng.randrange(4096), len(pages) - 1)] ^= 1 << rng.randrange(8)
        self._image = bytes(pages), self._image[1]

    def _note_log(self, connection: CuttableConnection) -> None:
        """How much of the log is synced before this commit, if it will not be."""
        if connection.is_durable:
            self._synced = None
        elif self._synced is None:
            pages, log = read_database(self.database)
            self._synced = _Synced(zlib.crc32(pages), log[:WAL_HEADER_BYTES], len(log))

    def _tear_files(self, rng: random.Random) -> None:
        for name in sorted(self._unsynced):
            path = Path(name)
            if path.is_file():
                os.truncate(path, rng.randrange(path.stat().st_size + 1))


# ---- the machine under the node ------------------------------------------------------------------------------

_disks: dict[str, Disk] = {}
"""The disks of this process by the folder that they are; what the hook below asks."""
_is_hooked = False
_os_fsync = os.fsync


@contextmanager
def mounted(disks: Mapping[str, Disk]) -> Iterator[None]:
    """While it lasts, operations on files under these disks pass their points."""
    global _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hear)
        _is_hooked = True
    added = {f"{disk.folder}{os.sep}": disk for disk in disks.values()}
    _disks.update(added)
    os.fsync = _fsync
    try:
        yield
    finally:
        for prefix in added:
            del _disks[prefix]
        if not _disks:
            os.fsync = _os_fsync


def remove_folder(folder: Path) -> None:
    """Removes a disk's folder for good."""
    shutil.rmtree(folder, ignore_errors=True)


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    """What Python tells of every operation on files; raising here ends it before it is done."""
    if not _disks or event not in _OPERATIONS:
        return
    operation = _OPERATIONS[event]
    if operation == "write" and not _is_for_writing(arguments[1], arguments[2]):
        return
    path = arguments[0]
    if not isinstance(path, str | os.PathLike):
        return
    text = os.fspath(path)
    disk = _disk_of(text)
    if disk is None:
        return
    disk.touch(operation, Path(text))
    if operation == "rename":
        disk.renamed(text, os.fspath(arguments[1]))


_OPERATIONS = {
    "open": "write",
    "os.rename": "rename",
    "os.remove": "remove",
    "shutil.rmtree": "remove",
}


def _is_for_writing(mode: Any, flags: Any = 0) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & _WRITES)


def _disk_of(path: Any) -> Disk | None:
    if not isinstance(path, str):
        return None
    for prefix, disk in _disks.items():
        if path.startswith(prefix):
            return disk
    return None


def _fsync(fd: FileDescriptorLike) -> None:
    number = fd if isinstance(fd, int) else fd.fileno()
    path = os.readlink(f"/proc/self/fd/{number}")
    disk = _disk_of(path)
    if disk is not None:
        disk.touch("sync", Path(path))
        disk.synced(path)
    _os_fsync(fd)
