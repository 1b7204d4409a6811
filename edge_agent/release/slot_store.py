"""Where a device keeps its releases, as a protocol: `slots.py` on disk, `memory_slots.py` in a simulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from edge_agent.release.files import FileSource, SlotContents, StagedRelease, Standing


class SlotStore(Protocol):
    """The releases of one device, and how another one becomes current."""

    @property
    def on_probation(self) -> bool:
        """Whether the current release was promoted and not confirmed yet."""
        ...

    @property
    def standing(self) -> Standing:
        """Version floor, ring serial and refused releases."""
        ...

    def current(self) -> SlotContents | None:
        """The release to serve: current, else last good, else factory, else None. Never raises."""
        ...

    def predecessor(self) -> SlotContents | None:
        """The release that the current one took over from, while that is on probation; else None. Never raises."""
        ...

    def held(self, graphs_sha256: str) -> frozenset[str]:
        """Names of the files of a model that are here, whole: they need not be downloaded."""
        ...

    def stage(
        self, files: Mapping[str, FileSource], *, serial: int = 0, rollback: bool = False
    ) -> StagedRelease:
        """Verifies a release and keeps it ready beside the slots.

        Args:
            files: `release.json`, `manifest.json`, `checkpoint.bin`, both golden files, and the graph files
                that `held` did not name.
            serial, rollback: of the ring file that named the release.

        Raises:
            BundleError: a file is missing or is not what was signed for.
            ReleaseError: it may not follow what ran here (`Standing.check`).
            StorageError: the disk is full.
        """
        ...

    def promote(self, staged: StagedRelease) -> SlotContents:
        """Makes a staged release current, on probation; what was current becomes the last good one.

        Raises:
            StorageError: it is not the one that is staged, or the disk failed; the slots are as they were.
        """
        ...

    def confirm(self) -> None:
        """Ends the probation of the current release well."""
        ...

    def roll_back(self) -> SlotContents | None:
        """Puts the last good (else the factory) release back; the one that failed is never staged again.

        With nothing to go back to, the current release stays. Returns what is current then.
        """
        ...
