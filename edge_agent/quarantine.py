"""A capped folder for what was found damaged: kept for a person to look at, never read again by the agent.

Laws of the file: keeping is best effort and never raises (a full disk must not turn damage into a crash); the
folder never grows above its cap, the oldest goes first. Source: docs/architecture.md, "The agent".
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

MAX_QUARANTINE_BYTES = 16 * 1024 * 1024
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


class Quarantine:
    """`quarantine/` of one device. Entries are `{serial}-{name}` beside `{serial}-{name}.reason`.

    Args:
        folder: made at the first entry; None keeps nothing (a simulated device has no disk).
        max_bytes: cap over all entries; what is larger by itself is thrown away, its reason stays.
    """

    def __init__(self, folder: Path | None, *, max_bytes: int = MAX_QUARANTINE_BYTES) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self.kept_total = 0

    def take(self, path: Path, reason: str) -> None:
        """Moves a file or folder away from where it stands; gone from there even if it cannot be kept."""
        self.kept_total += 1
        with contextlib.suppress(OSError):
            target = self._new_entry(path.name, reason)
            if target is not None and _size_bytes(path) <= self._max_bytes:
                os.replace(path, target)
        _remove(path)
        self._trim()

    def keep(self, name: str, data: bytes, reason: str) -> None:
        """Writes bytes that were found damaged (a database row, a download)."""
        self.kept_total += 1
        with contextlib.suppress(OSError):
            target = self._new_entry(name, reason)
            if target is not None and len(data) <= self._max_bytes:
                target.write_bytes(data)
        self._trim()

    def _new_entry(self, name: str, reason: str) -> Path | None:
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        serial = 1 + max((_serial(path) for path in self.folder.iterdir()), default=0)
        target = self.folder / f"{serial:08d}-{_UNSAFE.sub('_', name)[:100]}"
        target.with_name(target.name + ".reason").write_text(reason[:1000] + "\n", encoding="utf-8")
        return target

    def _trim(self) -> None:
        if self.folder is None:
            return
        with contextlib.suppress(OSError):
            entries = sorted(self.folder.iterdir())
            size_bytes = sum(_size_bytes(path) for path in entries)
            for path in entries:
                if size_bytes <= self._max_bytes:
                    return
                size_bytes -= _size_bytes(path)
                _remove(path)


def _serial(path: Path) -> int:
    digits = path.name.split("-", 1)[0]
    return int(digits) if digits.isdecimal() else 0


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir() and not path.is_symlink():
        yield from (item for item in path.rglob("*") if item.is_file())
    else:
        yield path


def _size_bytes(path: Path) -> int:
    return sum(item.stat().st_size for item in _files(path))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
