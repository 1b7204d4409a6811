"""The three releases on a device's disk: `current`, `last_good`, `factory`; and how one becomes current.

Laws of the file: every file of a release is on disk before its folder gets its name (write, fsync, rename,
fsync of the folder); after a crash at any instruction one of the slots is whole, and `current()` finds it; a
damaged slot goes to the quarantine and the next one serves. Source: docs/architecture.md, "State folder of a
device".

    slots/STATE.json                    probation, version floor, refused releases (`release_files.Standing`)
    slots/{current,last_good,factory}/  release.json manifest.json checkpoint.bin golden_*.bin int8.onnx
    slots/graphs/{graphs_sha256}/       the graph files, shared by all slots of one model
    slots/.staged .old .bad .copy       a swap on its way; what a crash leaves of it is settled at the next
    start
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from edge_agent.release.files import (
    INT8,
    FileSource,
    SlotContents,
    StagedRelease,
    Standing,
    read_contents,
    reader_of,
    verify_complete,
)
from edge_agent.release.slot_store import SlotStore
from edge_agent.store.disk import make_private_folder, sync_folder, write_durably
from edge_agent.store.quarantine import Quarantine
from wire.errors import BundleError, StorageError
from wire.manifest import (
    CHECKPOINT,
    GOLDEN_INPUTS,
    GOLDEN_OUTPUTS,
    GRAPH_FILES,
    MANIFEST,
    RELEASE,
    Manifest,
    Release,
)

__all__ = ["SlotContents", "SlotStore", "Slots", "StagedRelease"]

FOLDER_NAME: Final = "slots"
CURRENT: Final = "current"
LAST_GOOD: Final = "last_good"
FACTORY: Final = "factory"
_STAGED: Final = ".staged"
_OLD: Final = ".old"
_BAD: Final = ".bad"
_COPY: Final = ".copy"
_STATE: Final = "STATE.json"
_GRAPHS: Final = "graphs"
_RELEASE_FILES: Final = (RELEASE, MANIFEST, CHECKPOINT, GOLDEN_INPUTS, GOLDEN_OUTPUTS)


class Slots:
    """The slots of one device, under its state folder. Safe to use from several threads."""

    def __init__(self, folder: Path, *, quarantine: Quarantine | None = None) -> None:
        """Settles what a crash left of a swap.

        Raises:
            StorageError: the folder cannot be made.
        """
        self._root = folder / FOLDER_NAME
        self._quarantine = quarantine or Quarantine(folder / "quarantine")
        self._lock = threading.RLock()
        make_private_folder(self._root)
        make_private_folder(self._root / _GRAPHS)
        self._standing = self._read_standing()
        # A full or read-only disk must not keep the agent from serving what is here.
        with contextlib.suppress(OSError, StorageError):
            self._settle()

    @property
    def standing(self) -> Standing:
        return self._standing

    @property
    def on_probation(self) -> bool:
        return bool(self._standing.probation)

    def current(self) -> SlotContents | None:
        with self._lock:
            contents = self._load(CURRENT)
            if contents is None:
                contents = self._stand_in()
            return contents

    def predecessor(self) -> SlotContents | None:
        with self._lock:
            return self._load(LAST_GOOD) if self._standing.probation else None

    def held(self, graphs_sha256: str) -> frozenset[str]:
        place = self._root / _GRAPHS / graphs_sha256
        try:
            data = (place / MANIFEST).read_bytes()
            manifest = Manifest.from_bytes(data)
        except (OSError, BundleError):
            return frozenset()
        if hashlib.sha256(data).hexdigest() != graphs_sha256:
            return frozenset()
        names = {MANIFEST}
        for name in GRAPH_FILES:
            with contextlib.suppress(OSError, BundleError):
                manifest.file(name).check((place / name).read_bytes())
                names.add(name)
        return frozenset(names)

    def stage(
        self, files: Mapping[str, FileSource], *, serial: int = 0, rollback: bool = False
    ) -> StagedRelease:
        with self._lock:
            given = self._reader_over_held(files)
            new = StagedRelease(read_contents(given), serial, rollback)
            self._standing.check(new)
            int8 = verify_complete(new.contents)
            try:
                self._write_staged(new.contents, given, int8)
            except OSError as error:
                raise StorageError(
                    f"cannot stage release {new.contents.version}: {error.strerror}"
                ) from error
            contents = read_contents(self._reader(_STAGED))
            return StagedRelease(contents, serial, rollback)

    def promote(self, staged: StagedRelease) -> SlotContents:
        name = staged.contents.release_sha256
        with self._lock:
            if self._name(_STAGED) != name:
                raise StorageError(f"release {staged.contents.version} is not the one that is staged")
            self._standing.check(staged)
            self._write_standing(self._standing.promoted(staged))
            try:
                self._swap_in(replaces_itself=self._name(CURRENT) == name)
            except OSError as error:
                raise StorageError(
                    f"cannot swap in release {staged.contents.version}: {error.strerror}"
                ) from error
            return staged.contents

    def confirm(self) -> None:
        with self._lock:
            if self._standing.probation:
                self._write_standing(self._standing.confirmed())

    def roll_back(self) -> SlotContents | None:
        with self._lock:
            failed = self._name(CURRENT)
            target = self._way_back(failed)
            if target is None:
                self.confirm()
                return self.current()
            self._write_standing(self._standing.rolled_back(failed))
            try:
                self._go_back(target)
            except OSError as error:
                raise StorageError(f"cannot roll back: {error.strerror}") from error
            return self.current()

    # --- reading
    # ------------------------------------------------------------------------------------------------

    def _load(self, slot: str) -> SlotContents | None:
        """A slot that can serve, or None; a damaged one goes to the quarantine, a damaged int8 file is
        rebuilt.
        """
        if not (self._root / slot).is_dir():
            return None
        try:
            contents = read_contents(self._reader(slot))
            try:
                contents.int8()
            except BundleError:
                int8 = contents.rebuild_int8()
                if (self._root / slot / INT8).is_dir():
                    self._quarantine.take(self._root / slot / INT8, f"{INT8} of {slot} is not a file")
                with contextlib.suppress(StorageError):
                    write_durably(self._root / slot / INT8, int8)
            return contents
        except BundleError as error:
            self._quarantine.take(self._root / slot, f"slot {slot}: {error}")
            return None

    def _stand_in(self) -> SlotContents | None:
        """Another slot becomes current, because there is none that can serve."""
        for slot in (LAST_GOOD, FACTORY):
            contents = self._load(slot)
            if contents is not None:
                with contextlib.suppress(OSError, StorageError):
                    self._move_back(slot)
                    self.confirm()
                return contents
        return None

    def _name(self, slot: str) -> str:
        """Hex SHA-256 of a slot's `release.json`, or empty."""
        try:
            return hashlib.sha256((self._root / slot / RELEASE).read_bytes()).hexdigest()
        except OSError:
            return ""

    def _reader(self, slot: str) -> Callable[[str], bytes]:
        """Reads files of the release that is in `slot` now, and of no other, wherever a swap moves it."""
        release = self._name(slot)

        def read(name: str) -> bytes:
            for place in (slot, CURRENT, LAST_GOOD, FACTORY):
                if self._name(place) == release:
                    folder = self._root / place
                    return (
                        self._graphs_of(folder) / name if name in GRAPH_FILES else folder / name
                    ).read_bytes()
            raise FileNotFoundError(name)

        return read

    def _graphs_of(self, slot: Path) -> Path:
        return self._root / _GRAPHS / hashlib.sha256((slot / MANIFEST).read_bytes()).hexdigest()

    def _reader_over_held(self, files: Mapping[str, FileSource]) -> Callable[[str], bytes]:
        given = reader_of(files)
        graphs = (
            self._root / _GRAPHS / hashlib.sha256(given(MANIFEST)).hexdigest() if MANIFEST in files else None
        )

        def read(name: str) -> bytes:
            if name not in files and name in GRAPH_FILES and graphs is not None:
                return (graphs / name).read_bytes()
            return given(name)

        return read

    # --- writing
    # ------------------------------------------------------------------------------------------------

    def _write_staged(self, contents: SlotContents, given: Callable[[str], bytes], int8: bytes) -> None:
        graphs = self._root / _GRAPHS / contents.graphs_sha256
        graphs.mkdir(exist_ok=True, mode=0o700)
        held = self.held(contents.graphs_sha256)
        for name in (*GRAPH_FILES, MANIFEST):
            if name not in held:
                write_durably(graphs / name, given(name))
        staged = self._root / _STAGED
        _remove(staged)
        staged.mkdir(mode=0o700)
        for name in _RELEASE_FILES:
            write_durably(staged / name, given(name))
        write_durably(staged / INT8, int8)
        sync_folder(graphs.parent)
        sync_folder(self._root)

    def _swap_in(self, *, replaces_itself: bool) -> None:
        """The order of these moves is what `_settle` understands; each is on disk before the next."""
        _remove(self._root / _OLD)
        if replaces_itself:
            self._move(CURRENT, _OLD)
        else:
            self._move(LAST_GOOD, _OLD)
            self._move(CURRENT, LAST_GOOD)
        self._move(_STAGED, CURRENT)
        if not (self._root / FACTORY).is_dir():
            self._copy(CURRENT, FACTORY)
        _remove(self._root / _OLD)
        self._drop_unused_graphs()

    def _settle(self) -> None:
        """Finishes or undoes a swap that a crash interrupted (see `_swap_in` and `_go_back`)."""
        if (
            not self._name(CURRENT)
            and self._name(_STAGED)
            and self._name(_STAGED) == self._standing.probation
        ):
            self._move(_STAGED, CURRENT)
        if (
            self._name(CURRENT)
            and not self._name(LAST_GOOD)
            and self._name(_OLD) not in ("", self._name(CURRENT))
        ):
            self._move(_OLD, LAST_GOOD)
        failed = self._name(CURRENT)
        if failed and failed in self._standing.refused and (target := self._way_back(failed)) is not None:
            self._go_back(target)
        if self._standing.probation != self._name(CURRENT):
            self.confirm()
        for name in (_STAGED, _OLD, _BAD, _COPY):
            _remove(self._root / name)
        for unfinished in list(self._root.rglob(".*.new")):
            unfinished.unlink()

    def _way_back(self, failed: str) -> str | None:
        for slot in (LAST_GOOD, FACTORY):
            contents = self._load(slot)
            if contents is not None and contents.release_sha256 not in (failed, *self._standing.refused):
                return slot
        return None

    def _go_back(self, slot: str) -> None:
        _remove(self._root / _BAD)
        self._move(CURRENT, _BAD)
        self._move_back(slot)
        _remove(self._root / _BAD)
        self._drop_unused_graphs()

    def _move_back(self, slot: str) -> None:
        """The last good release moves; the factory one is copied, so that it is always there."""
        if slot == FACTORY:
            self._copy(FACTORY, CURRENT)
        else:
            self._move(slot, CURRENT)

    def _move(self, source: str, target: str) -> None:
        if (self._root / source).is_dir():
            os.rename(self._root / source, self._root / target)
            sync_folder(self._root)

    def _copy(self, source: str, target: str) -> None:
        partial = self._root / _COPY
        _remove(partial)
        partial.mkdir(mode=0o700)
        for path in sorted((self._root / source).iterdir()):
            write_durably(partial / path.name, path.read_bytes())
        self._move(_COPY, target)

    def _drop_unused_graphs(self) -> None:
        used = set()
        for slot in (CURRENT, LAST_GOOD, FACTORY, _STAGED):
            with contextlib.suppress(OSError):
                used.add(self._graphs_of(self._root / slot).name)
        for path in (self._root / _GRAPHS).iterdir():
            if path.name not in used:
                _remove(path)

    def _read_standing(self) -> Standing:
        path = self._root / _STATE
        try:
            return Standing.from_bytes(path.read_bytes())
        except OSError:
            return Standing(floor_version=self._newest_version())
        except StorageError as error:
            self._quarantine.take(path, str(error))
            return Standing(floor_version=self._newest_version())

    def _newest_version(self) -> int:
        versions = [0]
        for slot in (CURRENT, LAST_GOOD, FACTORY):
            with contextlib.suppress(OSError, BundleError):
                versions.append(Release.from_bytes((self._root / slot / RELEASE).read_bytes()).version)
        return max(versions)

    def _write_standing(self, standing: Standing) -> None:
        write_durably(self._root / _STATE, standing.to_bytes())
        self._standing = standing


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
