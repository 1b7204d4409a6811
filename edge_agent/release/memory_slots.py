"""Slots of a simulated device: the same rules as `slots.py`, no disk, and the bytes shared by a whole fleet.

Law of the file: a release is verified once per process and content hash; a thousand devices then hold one
copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from edge_agent.release.files import (
    INT8,
    FileSource,
    SlotContents,
    StagedRelease,
    Standing,
    read_contents,
    read_source,
    reader_of,
    verify_complete,
)
from wire.errors import StorageError
from wire.manifest import GRAPH_FILES, MANIFEST, RELEASE


class SharedReleases:
    """What the devices of one process share: verified releases and graph files, by their hashes."""

    def __init__(self) -> None:
        self._releases: dict[str, SlotContents] = {}
        self._graphs: dict[str, dict[str, bytes]] = {}

    def verified(self, files: Mapping[str, FileSource]) -> SlotContents:
        """The release of these files; the first device pays for the check.

        Raises:
            BundleError: a file is missing, or is not what was signed for.
        """
        name = hashlib.sha256(read_source(files[RELEASE])).hexdigest() if RELEASE in files else ""
        known = self._releases.get(name)
        if known is not None:
            return known
        plain = {key: read_source(value) for key, value in files.items()}
        manifest = hashlib.sha256(plain.get(MANIFEST, b"")).hexdigest()
        graphs = {key: data for key, data in plain.items() if key in (*GRAPH_FILES, MANIFEST)}
        complete = {**self._graphs.get(manifest, {}), **plain}
        contents = read_contents(reader_of(complete))
        complete[INT8] = verify_complete(contents)
        self._graphs.setdefault(contents.graphs_sha256, {}).update(graphs)
        contents = read_contents(reader_of(complete))
        self._releases[contents.release_sha256] = contents
        return contents

    def held(self, graphs_sha256: str) -> frozenset[str]:
        return frozenset(self._graphs.get(graphs_sha256, ()))


class MemorySlots:
    """See `slot_store.SlotStore`, whose protocol this is."""

    def __init__(self, shared: SharedReleases) -> None:
        self._shared = shared
        self._standing = Standing()
        self._staged: SlotContents | None = None
        self._current: SlotContents | None = None
        self._last_good: SlotContents | None = None
        self._factory: SlotContents | None = None

    @property
    def standing(self) -> Standing:
        return self._standing

    @property
    def on_probation(self) -> bool:
        return bool(self._standing.probation)

    def current(self) -> SlotContents | None:
        return self._current

    def predecessor(self) -> SlotContents | None:
        return self._last_good if self._standing.probation else None

    def held(self, graphs_sha256: str) -> frozenset[str]:
        return self._shared.held(graphs_sha256)

    def stage(
        self, files: Mapping[str, FileSource], *, serial: int = 0, rollback: bool = False
    ) -> StagedRelease:
        staged = StagedRelease(self._shared.verified(files), serial, rollback)
        self._standing.check(staged)
        self._staged = staged.contents
        return staged

    def promote(self, staged: StagedRelease) -> SlotContents:
        if self._staged is not staged.contents:
            raise StorageError(f"release {staged.contents.version} is not the one that is staged")
        self._standing.check(staged)
        self._standing = self._standing.promoted(staged)
        if self._current is not staged.contents:
            self._last_good = self._current
        self._current, self._staged = staged.contents, None
        self._factory = self._factory or staged.contents
        return staged.contents

    def confirm(self) -> None:
        self._standing = self._standing.confirmed()

    def roll_back(self) -> SlotContents | None:
        failed = self._current
        for target in (self._last_good, self._factory):
            if failed is None or target is None or target is failed:
                continue
            if target.release_sha256 in self._standing.refused:
                continue
            self._standing = self._standing.rolled_back(failed.release_sha256)
            self._current = target
            if target is self._last_good:
                self._last_good = None
            return target
        self.confirm()
        return self._current
