"""The one door to TUF: what the fleet's signed metadata says, and the files that it vouches for.

Laws of the file: nothing is believed that TUF did not verify against the root of the day of enrolment; time
comes from our clock, never from the machine's (`_session`, the one place); the folder is staging only: it may
be lost at any moment, so the version floor lives with the slots. tuf and what it brings (about 10 MiB) are
imported inside the functions: an agent that is not checking does not pay for them. Source:
docs/architecture.md, "TUF layout".
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

from edge_agent.store.disk import make_private_folder, private_opener
from edge_agent.uplink.online_keys import ONLINE_KEYS, OnlineKeys
from process.clock import Clock
from wire.enrolment import DeviceId
from wire.errors import RefusedError, ReleaseError, StorageError
from wire.helper import HELPER_JSON
from wire.manifest import (
    CHECKPOINT,
    GOLDEN_INPUTS,
    GOLDEN_OUTPUTS,
    GRAPH_FILES,
    MANIFEST,
    MAX_FILE_BYTES,
    RELEASE,
    Release,
)

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile
    from tuf.ngclient import Updater
    from tuf.ngclient.fetcher import FetcherInterface

    from edge_agent.release.fetcher import Fetcher

METADATA_PATH: Final = "/metadata"
TARGETS_PATH: Final = "/targets"
AUTHORITIES_PEM: Final = "keys/authorities.pem"
LISTERS: Final = ("root", "targets", "keys")
"""The roles of TUF that list keys; the sum of their versions is `keys_version`."""
MAX_SMALL_TARGET_BYTES: Final = 256 * 1024
SIGNED_AT: Final = "shoal_signed_at"
"""The field of timestamp.json that says when it was signed (unix seconds)."""
# tuf wants absolute URLs; the scheme and host are ours and go nowhere.
_BASE: Final = "shoal://fleet"
_METADATA: Final = "metadata"
_TARGETS: Final = "targets"


class _RingFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ring: DeviceId
    release_version: Annotated[int, Meta(ge=1, le=2**53)]
    rollback: bool
    serial: Annotated[int, Meta(ge=0, le=2**53)]


@dataclass(frozen=True, slots=True)
class ReleaseInfo:
    """What a check found.

    Attributes:
        release_version: that the ring shall run; 0 while the ring has none.
        rollback: this release may be older than what runs.
        serial: of the ring file; grows with every change of it.
        keys: the online keys.
        signed_at, expires: when the newest timestamp was signed (0: it does not say), and when it ends.
        helper: the file that names the fleet's helper, which only the targets key signs; empty where there is none.
        session: what `download` needs to go on from here.
    """

    ring: str
    release_version: int
    rollback: bool
    serial: int
    keys: OnlineKeys
    signed_at: float
    expires: float
    session: _Session = field(repr=False, compare=False)
    helper: bytes = b""


class _Session:
    """One updater: what it has verified holds for `check` and for the `download` after it."""

    def __init__(self, folder: Path, updater: Updater, fetcher: Fetcher) -> None:
        self.folder = folder
        self.updater = updater
        self.fetcher = fetcher

    @property
    def signed(self) -> tuple[float, float]:
        """When the newest timestamp was signed (0: it does not say), and when it ends."""
        timestamp = self.updater._trusted_set.timestamp
        expires = timestamp.expires.timestamp()
        stated = timestamp.unrecognized_fields.get(SIGNED_AT)
        if isinstance(stated, int) and 0 <= stated <= expires:
            return float(stated), expires
        return 0.0, expires

    @property
    def keys_version(self) -> int:
        """The versions of all that lists keys, together: another number whenever another key counts."""
        return sum(self.updater._trusted_set[role].version for role in LISTERS)

    def target(self, path: str) -> TargetFile | None:
        with _translated(path):
            info = self.updater.get_targetinfo(path)
        if info is not None and "sha256" not in info.hashes:
            raise ReleaseError(f"{path} is signed without a SHA-256")
        return info

    def small_target(self, path: str) -> bytes | None:
        """A target's bytes, or None when there is no such target."""
        info = self.target(path)
        if info is None:
            return None
        if info.length > MAX_SMALL_TARGET_BYTES:
            raise ReleaseError(f"{path} is too long", size_bytes=info.length)
        pieces = self.fetcher.fetch(_location(info), limit_bytes=info.length)
        data = b"".join(pieces)
        with _translated(path):
            info.verify_length_and_hashes(data)
        return data

    def file(self, path: str) -> Path:
        """Downloads a target into the staging folder; goes on where an earlier attempt stopped."""
        info = self.target(path)
        if info is None:
            raise ReleaseError(f"the signed metadata names no {path}")
        if info.length > MAX_FILE_BYTES:
            raise ReleaseError(f"{path} is too long", size_bytes=info.length, limit_bytes=MAX_FILE_BYTES)
        place = self.folder / _TARGETS / info.hashes["sha256"]
        was_there = self._append(place, info)
        try:
            return self._verified(place, info)
        except ReleaseError:
            if not was_there:
                raise
        # What an earlier run left may be what is damaged: once more, from the start.
        self._append(place, info)
        return self._verified(place, info)

    def prune(self, *paths: str) -> None:
        """Drops what lies in the staging folder and belongs to none of these targets: parts of a release that was never
        finished, because the next one came before."""
        wanted = {info.hashes["sha256"] for path in paths if (info := self.target(path)) is not None}
        with contextlib.suppress(FileNotFoundError):
            for place in (self.folder / _TARGETS).iterdir():
                if place.name not in wanted:
                    place.unlink(missing_ok=True)

    def _append(self, place: Path, info: TargetFile) -> bool:
        """Fetches what is missing of a file; returns whether some of it was there."""
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(place, "ab", opener=private_opener) as file:
            there = file.tell()
            if there < info.length:
                limit = info.length - there
                for piece in self.fetcher.fetch(_location(info), offset=there, limit_bytes=limit):
                    file.write(piece)
        return there > 0

    def _verified(self, place: Path, info: TargetFile) -> Path:
        """The file, whole; one that does not verify is removed."""
        try:
            with _translated(info.path), place.open("rb") as file:
                info.verify_length_and_hashes(file)
        except ReleaseError:
            place.unlink(missing_ok=True)
            raise
        return place


def check(folder: Path, root: bytes, fetcher: Fetcher, ring: str, clock: Clock) -> ReleaseInfo:
    """Refreshes the metadata and reads the online keys and what the ring shall run.

    Args:
        folder: staging folder (`tuf/` of the state folder).
        root: the `root.json` of the day of enrolment.
        clock: decides what has expired; give it a floor (`time_floor.py`).

    Raises:
        ReleaseError: metadata that is expired, older than known, wrongly signed or not ours.
        TransportError: the repository cannot be reached.
    """
    session = _session(folder, root, fetcher, clock)
    listed = session.small_target(ONLINE_KEYS)
    if listed is None:
        raise ReleaseError(f"the signed metadata names no {ONLINE_KEYS}")
    keys = OnlineKeys.from_json(listed, version=session.keys_version)
    helper = session.small_target(HELPER_JSON) or b""
    data = session.small_target(f"rings/{ring}.json")
    if data is None:
        return ReleaseInfo(ring, 0, False, 0, keys, *session.signed, session, helper)
    named = _decode(data, _RingFile, f"rings/{ring}.json")
    if named.ring != ring:
        raise ReleaseError(f"rings/{ring}.json is for ring {named.ring}")
    return ReleaseInfo(
        ring, named.release_version, named.rollback, named.serial, keys, *session.signed, session, helper
    )


def newer_authorities(session: _Session, known: bytes) -> bytes | None:
    """The certificate authorities (PEM) that the fleet's metadata lists; None when these are the known ones, or it
    lists none.

    Raises:
        ReleaseError: what is signed cannot be used.
        TransportError: the repository cannot be reached.
    """
    info = session.target(AUTHORITIES_PEM)
    if info is None or info.hashes["sha256"] == hashlib.sha256(known).hexdigest():
        return None
    return session.small_target(AUTHORITIES_PEM)


def find_authorities(folder: Path, root: bytes, fetcher: Fetcher, clock: Clock, known: bytes) -> bytes | None:
    """`newer_authorities` without a release check: for a device that trusts no server any more. Whoever `fetcher`
    brings the metadata from, TUF decides; an old set of it is refused as in every check.

    Args:
        folder, root, clock: as for `check`.
    """
    return newer_authorities(_session(folder, root, fetcher, clock), known)


def download(info: ReleaseInfo, *, held: Callable[[str], frozenset[str]]) -> dict[str, Path]:
    """Brings the files of a release into the staging folder.

    Args:
        held: gives, for a `graphs_sha256`, the names of the files that are here already (`Slots.held`).

    Returns:
        Name to path, for `Slots.stage`: `release.json`, `manifest.json`, `checkpoint.bin`, the golden files
        and the graph files that were not held. Every file has the hash that TUF vouches for.

    Raises:
        ReleaseError: a file that does not verify, or a release that is not the one of the ring.
        TransportError: the repository cannot be reached; another call goes on where this one stopped.
        StorageError: the disk is full.
    """
    session = info.session
    base = f"parameters/{info.release_version}"
    try:
        files = {RELEASE: session.file(f"{base}/{RELEASE}")}
        release = _release(files[RELEASE].read_bytes(), info.release_version)
        for name in (CHECKPOINT, GOLDEN_INPUTS, GOLDEN_OUTPUTS):
            files[name] = session.file(f"{base}/{name}")
        graphs = f"graphs/{release.graphs_sha256}"
        session.prune(
            *(f"{base}/{name}" for name in (RELEASE, CHECKPOINT, GOLDEN_INPUTS, GOLDEN_OUTPUTS)),
            *(f"{graphs}/{name}" for name in (MANIFEST, *GRAPH_FILES)),
        )
        files[MANIFEST] = session.file(f"{graphs}/{MANIFEST}")
        if hashlib.sha256(files[MANIFEST].read_bytes()).hexdigest() != release.graphs_sha256:
            raise ReleaseError(f"{graphs}/{MANIFEST} is not the manifest of that name")
        for name in set(GRAPH_FILES) - held(release.graphs_sha256):
            files[name] = session.file(f"{graphs}/{name}")
    except OSError as error:
        raise StorageError(
            f"cannot stage release {info.release_version}: {error.strerror or error}"
        ) from error
    return files


def seed_staging(folder: Path, known: Mapping[str, bytes]) -> None:
    """Puts bytes where `download` looks for what an earlier attempt left; it verifies them like everything else.

    Args:
        known: bytes by their SHA-256 (hex).
    """
    place = folder / _TARGETS
    for name, data in known.items():
        # What cannot be written is downloaded, or fails there with a reason.
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(place / name, "wb", opener=private_opener) as file:
                file.write(data)


def clear_staging(folder: Path) -> None:
    """Drops downloaded files (they are in a slot now, or not wanted); the metadata stays."""
    shutil.rmtree(folder / _TARGETS, ignore_errors=True)


def _session(folder: Path, root: bytes, fetcher: Fetcher, clock: Clock) -> _Session:
    from tuf.ngclient import Updater, UpdaterConfig

    metadata = folder / _METADATA
    make_private_folder(folder)
    make_private_folder(metadata)
    with _translated("metadata"):
        updater = Updater(
            str(metadata),
            f"{_BASE}{METADATA_PATH}/",
            fetcher=_adapter(fetcher),
            config=UpdaterConfig(prefix_targets_with_hash=True, max_root_rotations=64, max_delegations=8),
            bootstrap=root,
        )
        # tuf has no argument for its clock; a contract test notices when this private name moves.
        updater._trusted_set.reference_time = datetime.datetime.fromtimestamp(clock.now(), datetime.UTC)
        updater.refresh()
    return _Session(folder, updater, fetcher)


def _adapter(fetcher: Fetcher) -> FetcherInterface:
    from tuf.api.exceptions import DownloadHTTPError
    from tuf.ngclient.fetcher import FetcherInterface

    class Adapter(FetcherInterface):
        """Our fetcher as tuf wants it, without tuf's temporary files."""

        def _fetch(self, url: str) -> Iterator[bytes]:
            return fetcher.fetch(url.removeprefix(_BASE), limit_bytes=MAX_FILE_BYTES)

        @contextlib.contextmanager
        def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
            try:
                pieces = fetcher.fetch(url.removeprefix(_BASE), limit_bytes=max_length)
                yield io.BytesIO(b"".join(pieces))
            except RefusedError as error:
                raise DownloadHTTPError(str(error), int(error.facts.get("status", 500))) from error

    return Adapter()


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    from tuf.api.exceptions import DownloadError, RepositoryError

    try:
        yield
    except (RepositoryError, DownloadError, ValueError) as error:
        raise ReleaseError(
            f"{what} does not verify: {error}",
            hint="an outdated repository, somebody in between, or this device's clock is wrong",
        ) from error
    except OSError as error:
        raise StorageError(f"cannot keep the release metadata: {error.strerror or error}") from error


def _location(info: TargetFile) -> str:
    """Where a target is served (consistent snapshots: its hash stands before its file name)."""
    folder, slash, name = info.path.rpartition("/")
    return f"{TARGETS_PATH}/{folder}{slash}{info.hashes['sha256']}.{name}"


def _release(data: bytes, version: int) -> Release:
    release = Release.from_bytes(data)
    if release.version != version:
        raise ReleaseError(f"parameters/{version} holds release {release.version}")
    return release


S = TypeVar("S", bound=Struct)


def _decode(data: bytes, kind: type[S], path: str) -> S:
    try:
        return msgspec.json.decode(data, type=kind, strict=True)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ReleaseError(f"{path} is signed, but not what it should be: {error}") from error
