"""Which releases were signed, where they passed their self-test, what rings say, and what answers: books of their own.

Laws of the file: as of `ledger.py`; what is signed is read from the signed files themselves, and what answers from the
answers. Sources: DESIGN.md, laws 2 and 5; docs/architecture.md, "TUF layout" and "Model swap".
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

RINGS_METADATA = ".rings.json"
TIMESTAMP = "/timestamp.json"


@dataclass(frozen=True, slots=True)
class Statement:
    """What a ring runs, as it was signed."""

    serial: int
    version: int
    is_rollback: bool


class ModelLedger:
    """The books about models of one history.

    Args:
        violated: told of what must never be; raises.
        refused: the releases that failed on a device, by its own disk.
    """

    def __init__(
        self, violated: Callable[[str, str], NoReturn], refused: Callable[[str], frozenset[str]]
    ) -> None:
        self._violated = violated
        self._refused = refused
        self._names: dict[int, str] = {}
        self._releases: set[str] = set()
        self._passed: set[tuple[str, str]] = set()
        self._served: dict[str, list[int]] = defaultdict(list)
        self._statements: dict[str, bytes] = {}
        self._metadata: dict[str, bytes] = {}
        self.stated: list[Statement] = []

    @property
    def newest(self) -> Statement | None:
        """What the ring runs now."""
        return self.stated[-1] if self.stated else None

    # ---- what was signed ---------------------------------------------------------------------------------------

    def written(self, key: str, data: bytes) -> None:
        """Learns from a file of the signed repository. A ring's statement is made once a timestamp leads to it."""
        if key.startswith("tuf/targets/rings/"):
            self._statements[hashlib.sha256(data).hexdigest()] = data
        elif key.startswith("tuf/metadata/") and key.endswith(".parameters.json"):
            for path, target in _signed(data)["targets"].items():
                if path.endswith("/release.json"):
                    self._releases.add(target["hashes"]["sha256"])
        elif key.endswith((RINGS_METADATA, ".snapshot.json")):
            self._metadata[key.rpartition("/")[2]] = data
        elif key.endswith(TIMESTAMP):
            self._follow(data)

    def _follow(self, timestamp: bytes) -> None:
        snapshot = self._listed(timestamp, "snapshot.json")
        rings = self._listed(snapshot, "rings.json") if snapshot is not None else None
        for target in _signed(rings)["targets"].values() if rings is not None else ():
            self._state(target["hashes"]["sha256"])

    def _listed(self, metadata: bytes, name: str) -> bytes | None:
        listed = _signed(metadata)["meta"].get(name)
        return None if listed is None else self._metadata[f"{listed['version']}.{name}"]

    def _state(self, sha256: str) -> None:
        plain = json.loads(self._statements[sha256])
        statement = Statement(plain["serial"], plain["release_version"], plain["rollback"])
        last = self.newest
        if statement == last:
            return
        if last is not None and statement.serial <= last.serial:
            self._violated("cloud", f"two statements about a ring have the serial {statement.serial}")
        if last is not None and statement.version < last.version and not statement.is_rollback:
            self._violated("cloud", f"a ring went back to release {statement.version} without a rollback")
        self.stated.append(statement)

    # ---- what answers ------------------------------------------------------------------------------------------

    def passed_selftest(self, device: str, release_sha256: str) -> None:
        """A release passed its self-test there."""
        self._passed.add((device, release_sha256))

    def served(self, device: str, version: int, release_sha256: str) -> None:
        """A release answered an inference there."""
        history = self._served[device]
        if history and history[-1] == version:
            return
        if release_sha256 not in self._releases:
            self._violated(device, f"serves release {version}, which nobody signed")
        if (device, release_sha256) not in self._passed:
            self._violated(device, f"serves release {version}, which did not pass its self-test there")
        self._names[version] = release_sha256
        if history and version < max(history) and not self._may_go_back(device, version):
            self._violated(device, f"serves release {version} below its floor, which is {max(history)}")
        history.append(version)

    def _may_go_back(self, device: str, version: int) -> bool:
        """To the release before the newest, when that is noted on the disk as one that failed there; to another one by
        a signed statement that is newer than the one which brought what served until now."""
        history = self._served[device]
        newest = history.index(max(history))
        has_failed = self._names[max(history)] in self._refused(device)
        if newest > 0 and version == history[newest - 1] and has_failed:
            return True
        brought = max((each.serial for each in self.stated if each.version == history[-1]), default=0)
        ways = [each for each in self.stated if each.is_rollback and each.version == version]
        return any(each.serial > brought for each in ways) or any(
            # Off a release that was rolled back to, back to what the device held before it.
            each.is_rollback and each.version == history[-1] and version in history
            for each in self.stated
        )

    def no_model(self, device: str) -> None:
        """Nothing answers there just now."""
        if self._served[device]:
            self._violated(device, "nothing answers, although it has had a model")

    def behind(self, statement: Statement, devices: Iterable[str]) -> list[str]:
        """Who has not followed a statement, nor a later one, nor found its release wanting."""
        later = {each.version for each in self.stated if each.serial >= statement.serial}
        return [device for device in devices if not later & set(self._served[device][-2:])]


def _signed(metadata: bytes) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(metadata)["signed"]
    return found


def refused_in(folder: Path) -> frozenset[str]:
    """The releases that failed on a device, as its folder of slots says now; none where it says nothing."""
    try:
        first = (folder / "STATE.json").read_bytes().partition(b"\n")[0]
        return frozenset(json.loads(first)["refused"])
    except (OSError, ValueError, KeyError):
        return frozenset()
