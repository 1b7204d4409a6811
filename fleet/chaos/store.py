"""The aggregator's store of bytes under faults: what `Artefacts` promises, over memory that outlives the process.

Laws of the file: a write is there whole or not at all, and stays; every write is a point before and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cloud_server.artefacts import Artefacts
from fleet.chaos.faults import Fault
from wire.errors import StorageError

PassBy = Callable[[str], Fault | None]
Crashed = Callable[[Fault], None]


class ChaosArtefacts(Artefacts):
    """One life's view of the store.

    Args:
        files: what lies there; shared by the lives of one aggregator.
        pass_by: tells what strikes at a point.
        crash: ends this life.
        written: told of every write that is through.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        pass_by: PassBy,
        crash: Crashed,
        written: Callable[[str, bytes], None],
    ) -> None:
        super().__init__(None)
        self._files = files
        self._pass_by = pass_by
        self._crash = crash
        self._written = written

    def keys(self, prefix: str) -> Iterator[str]:
        yield from sorted(key for key in self._files if key.startswith(f"{prefix}/"))

    def size(self, key: str) -> int | None:
        data = self._files.get(key)
        return None if data is None else len(data)

    def read_range(self, key: str, start: int, end: int) -> bytes:
        return self._files[key][start:end]

    def _get(self, key: str) -> bytes | None:
        return self._files.get(key)

    def _delete(self, key: str) -> None:
        self._files.pop(key, None)

    def _put(self, key: str, data: bytes, *, is_new: bool) -> bool:
        fault = self._pass_by(point_of(key))
        if fault is not None and fault.kind == "crash_before":
            self._crash(fault)
        if fault is not None and fault.kind == "disk_full":
            raise StorageError(f"the artefact store failed at {key}: no space", key=key, is_missing=False)
        is_kept = not (is_new and key in self._files)
        if is_kept:
            self._files[key] = data
            self._written(key, data)
        if fault is not None:
            self._crash(fault)
        return is_kept


def point_of(key: str) -> str:
    """The point of a write, by what is written."""
    if key.startswith("tuf/metadata/"):
        return "cloud.store.sign"
    return "cloud.store.blob" if key.startswith("blobs/") else "cloud.store.release"
