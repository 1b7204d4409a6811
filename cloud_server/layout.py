"""The aggregator's state folder: where each thing lies, and that it is ours.

    FORMAT         "shoal-cloud 1"
    settings.toml  read by every command
    keys/          private keys, 0600; keys/offline may be carried away
    ca/            the certificate authority and the server's certificate
    cloud.db       the database, unless settings name another
    artefacts/     blobs, releases, the signed repository, unless settings name another place
    bundles/       imported models, by the hash of their graphs
    admin.token    token of the first admin, 0600; not read by anything here
    broker/        configuration and state of a broker that is started here
    locks/         one writer of the signed repository, one running service

Laws of the file: a folder without our FORMAT is never written to; the format number changes only with a
migration.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wire.errors import ConfigurationError, StorageError

FORMAT = "shoal-cloud 1"
_MAX_FORMAT_BYTES = 100


@dataclass(frozen=True)
class StateFolder:
    """The paths of one state folder."""

    root: Path

    @property
    def format(self) -> Path:
        return self.root / "FORMAT"

    @property
    def settings(self) -> Path:
        return self.root / "settings.toml"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def authority(self) -> Path:
        return self.root / "ca"

    @property
    def database(self) -> Path:
        return self.root / "cloud.db"

    @property
    def artefacts(self) -> Path:
        return self.root / "artefacts"

    @property
    def bundles(self) -> Path:
        return self.root / "bundles"

    @property
    def first_admin(self) -> Path:
        return self.root / "admin.token"

    @property
    def broker(self) -> Path:
        return self.root / "broker"

    @property
    def partials(self) -> Path:
        """Chunks of large updates that are not whole yet."""
        return self.root / "partials"

    def bundle(self, graphs_sha256: str) -> Path:
        """Where an imported model lies."""
        return self.bundles / graphs_sha256

    def check(self) -> None:
        """Looks whether this is a state folder of this version.

        Raises:
            ConfigurationError: (operator) it is none, or of another version.
            StorageError: (operator) it is somebody else's.
        """
        try:
            with self.format.open("rb") as file:
                found = file.read(_MAX_FORMAT_BYTES).decode("utf-8").strip()
        except PermissionError as error:
            raise StorageError(
                f"{self.format} cannot be read: {error.strerror}",
                hint="run as the user that made the folder",
                path=str(self.format),
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{self.root} is not a state folder of an aggregator",
                hint=f"make one: shoal-cloud init --state {self.root}",
            ) from error
        if found != FORMAT:
            raise ConfigurationError(
                f"{self.root} has format {found[:40]!r}, this version reads {FORMAT!r}",
                hint="use the version of Shoal that made it",
            )

    def create(self) -> None:
        """Makes the folder (0700), which must not exist or be empty. Its FORMAT comes last, by `seal`.

        Raises:
            ConfigurationError: (operator) something lies there.
            StorageError: (disk) it cannot be made.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(self.root.iterdir()):
                raise ConfigurationError(
                    f"{self.root} is not empty", hint="name another folder: nothing is ever overwritten"
                )
            for folder in (self.bundles, self.broker, self.root / "locks"):
                folder.mkdir(mode=0o700)
        except OSError as error:
            raise StorageError(
                f"{self.root} cannot be made: {error.strerror}", path=str(self.root)
            ) from error

    @property
    def is_sealed(self) -> bool:
        """Whether the folder is complete."""
        return self.format.exists()

    def discard(self) -> None:
        """Takes back what `create` and its caller made; the folder itself stays where it was there before."""
        for entry in self.root.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.root.rmdir()

    def seal(self) -> None:
        """Says that the folder is complete."""
        try:
            self.format.write_text(FORMAT + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{self.format} cannot be written: {error.strerror}") from error

    def lock(self, name: str) -> FileLock:
        """A lock that excludes other processes and threads while it is held."""
        return FileLock(self.root / "locks" / name)


class FileLock:
    """An advisory lock on a file; a process that dies gives it back. A reusable context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: list[int] = []

    def __enter__(self) -> FileLock:
        self._held.append(self._open(fcntl.LOCK_EX))
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._held.pop())

    @contextlib.contextmanager
    def at_once(self, refusal: str) -> Iterator[None]:
        """Holds the lock, or does not wait for it.

        Raises:
            ConfigurationError: (operator) somebody else has it; says `refusal`.
        """
        try:
            descriptor = self._open(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(refusal) from error
        try:
            yield
        finally:
            os.close(descriptor)

    def _open(self, operation: int) -> int:
        # A descriptor of its own for every holder: flock then excludes threads of one process too.
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"the lock {self._path} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, operation)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor


def is_locked(lock: FileLock) -> bool:
    """Whether some process holds the lock now."""
    try:
        with lock.at_once("held"):
            return False
    except ConfigurationError:
        return True
