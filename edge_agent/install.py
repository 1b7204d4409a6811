"""From a release that the fleet's metadata names to a model that serves: check, download, prove, promote,
load.

Laws of the file: a model becomes current only by verified files → self-test in a child → slot; the model that
serves is not touched before its successor is loaded. It runs on the worker's thread. Source:
docs/architecture.md, laws 2 and 5.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_agent import tuf_client
from edge_agent.fetcher import Fetcher
from edge_agent.identity import Identity
from edge_agent.ports import Engine, SelfTest, Variant
from edge_agent.release_files import FileSource, SlotContents
from edge_agent.serving import ServedModel
from edge_agent.slots import SlotStore
from edge_agent.storage import Database
from edge_agent.tuf_client import OnlineKeys, ReleaseInfo
from process.clock import Clock
from process.logs import get_logger

_log = get_logger("edge_agent.install")

VARIANT_FACT = "served_variant"
MAX_TIMESTAMP_BYTES = 65_536


class ReleaseSource(Protocol):
    """Where verified releases come from."""

    def check(self) -> ReleaseInfo:
        """What the ring shall run, and the online keys; raises as `tuf_client.check`."""
        ...

    def download(self, info: ReleaseInfo, held: Callable[[str], frozenset[str]]) -> Mapping[str, FileSource]:
        """The files of a release that are not held; raises as `tuf_client.download`."""
        ...

    def clear(self) -> None:
        """Drops what was downloaded: it is in a slot now."""
        ...


class TufReleases:
    """Releases of the fleet's TUF repository.

    Args:
        folder: staging, `tuf/` of the state folder.
        clock: decides what has expired; give it the floored one.
    """

    def __init__(self, folder: Path, identity: Identity, fetcher: Fetcher, clock: Clock) -> None:
        self._folder = folder
        self._identity = identity
        self._fetcher = fetcher
        self._clock = clock

    def check(self) -> ReleaseInfo:
        return tuf_client.check(
            self._folder, self._identity.tuf_root, self._fetcher, self._identity.ring, self._clock
        )

    def download(self, info: ReleaseInfo, held: Callable[[str], frozenset[str]]) -> Mapping[str, FileSource]:
        return tuf_client.download(info, held=held)

    def clear(self) -> None:
        tuf_client.clear_staging(self._folder)


class SharedTufReleases:
    """Releases for many devices of one process: the first to see a new timestamp.json verifies it for all.

    Every device still fetches the timestamp itself, so one that cannot reach the repository does not learn of
    a release; what is shared is the result of the same check of the same bytes against the same root.
    """

    def __init__(self, releases: TufReleases, fetcher: Fetcher) -> None:
        self._releases = releases
        self._fetcher = fetcher
        self._checked: dict[bytes, ReleaseInfo] = {}
        self._downloaded: dict[int, Mapping[str, FileSource]] = {}

    def check(self) -> ReleaseInfo:
        path = f"{tuf_client.METADATA_PATH}/timestamp.json"
        seen = b"".join(self._fetcher.fetch(path, limit_bytes=MAX_TIMESTAMP_BYTES))
        name = hashlib.sha256(seen).digest()
        if name not in self._checked:
            self._checked = {name: self._releases.check()}
            self._downloaded.clear()
        return self._checked[name]

    def download(self, info: ReleaseInfo, held: Callable[[str], frozenset[str]]) -> Mapping[str, FileSource]:
        if info.release_version not in self._downloaded:
            files = self._releases.download(info, lambda _: frozenset())
            plain = {
                name: Path(file).read_bytes() if isinstance(file, Path) else file
                for name, file in files.items()
            }
            self._downloaded[info.release_version] = plain
        return self._downloaded[info.release_version]

    def clear(self) -> None:
        """What is shared stays: another device may need it."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a release check led to.

    Attributes:
        installed: the new release and its loaded model, or None when there is nothing new.
    """

    keys: OnlineKeys
    installed: tuple[SlotContents, ServedModel] | None


class Installer:
    """Checks for releases and installs them, for one device.

    Args:
        variant: `auto`, or the file that shall serve whatever the self-test measured.
    """

    def __init__(
        self,
        source: ReleaseSource,
        slots: SlotStore,
        selftest: SelfTest,
        engine: Engine,
        database: Database,
        *,
        variant: str,
    ) -> None:
        self._source = source
        self._slots = slots
        self._selftest = selftest
        self._engine = engine
        self._database = database
        self._variant = variant

    def check(self) -> Checked:
        """Looks for a release and makes it current, on probation.

        Raises:
            ReleaseError: metadata or files that do not verify, or a release that may not follow.
            TransportError: the repository cannot be reached.
            SelfTestError: the release does not answer as it was signed to.
            StorageError: the disk is full.
        """
        info = self._source.check()
        current = self._slots.current()
        is_same = current is not None and current.version == info.release_version
        if info.release_version == 0 or is_same:
            return Checked(info.keys, None)
        files = self._source.download(info, self._slots.held)
        staged = self._slots.stage(files, serial=info.serial, rollback=info.rollback)
        verdict = self._selftest.check(staged.contents)
        _log.info(
            "release_passed_selftest",
            version=staged.contents.version,
            faster=verdict.variant,
            int8_seconds=verdict.int8_seconds,
            float32_seconds=verdict.float32_seconds,
        )
        contents = self._slots.promote(staged)
        self._source.clear()
        chosen = verdict.variant if self._variant == "auto" else self._variant
        self._database.set_fact(VARIANT_FACT, f"{contents.release_sha256}:{chosen}")
        return Checked(info.keys, (contents, self.load(contents)))

    def load(self, contents: SlotContents) -> ServedModel:
        """A slot's release as a model that can answer.

        Raises:
            BundleError: a file is not what was signed for.
            ModelError: it does not load.
        """
        variant = self._variant_of(contents)
        model = contents.int8() if variant == "int8" else contents.float32()
        return ServedModel(
            session=self._engine.load_inference(model),
            task=contents.manifest.task,
            input_shape=tuple(contents.manifest.input_shape),
            release_version=contents.version,
            graphs_sha256=bytes.fromhex(contents.graphs_sha256),
            release_sha256=bytes.fromhex(contents.release_sha256),
            variant=variant,
        )

    def _variant_of(self, contents: SlotContents) -> Variant:
        """The setting, else what was measured at the installation, else int8."""
        chosen = self._variant
        if chosen == "auto":
            name, _, measured = str(self._database.fact(VARIANT_FACT) or "").partition(":")
            chosen = measured if name == contents.release_sha256 else "int8"
        return "float32" if chosen == "float32" else "int8"
