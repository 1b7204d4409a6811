"""From a release that the fleet's metadata names to a model that serves: check, download, prove, promote,
load.

Laws of the file: a model becomes current only by verified files → self-test in a child → slot; the model that
serves is not touched before its successor is loaded. It runs on the worker's thread. Source:
docs/architecture.md, laws 2 and 5.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from edge_agent.enrolment.identity import Identity
from edge_agent.inference.serving import ServedModel
from edge_agent.ports import Engine, SelfTest, Variant
from edge_agent.release import tuf_client
from edge_agent.release.files import SlotContents, read_source, refuse_strangers
from edge_agent.release.slots import SlotStore
from edge_agent.release.source import Held, Known, Offer, ReleaseSource
from edge_agent.store.storage import Database
from edge_agent.uplink.online_keys import OnlineKeys
from process.clock import Clock
from process.logs import get_logger
from wire.errors import BundleError
from wire.manifest import GOLDEN_INPUTS, GRAPH_FILES, MANIFEST

if TYPE_CHECKING:
    from edge_agent.release.fetcher import Fetcher

_log = get_logger("edge_agent.release.install")

VARIANT_FACT = "served_variant"
MAX_TIMESTAMP_BYTES = 65_536


class TufReleases:
    """Releases of the fleet's TUF repository, checked in this process.

    Args:
        folder: staging, `tuf/` of the state folder.
        clock: decides what has expired; give it the floored one.
    """

    def __init__(self, folder: Path, identity: Identity, fetcher: Fetcher, clock: Clock) -> None:
        self._folder = folder
        self._identity = identity
        self._fetcher = fetcher
        self._clock = clock

    def fetch(self, current_version: int, held: Held, known: Known) -> Offer:
        before = self._fetcher.fetched_bytes_total
        info = tuf_client.check(
            self._folder, self._identity.tuf_root, self._fetcher, self._identity.ring, self._clock
        )
        is_new = info.release_version not in (0, current_version)
        if is_new:
            tuf_client.seed_staging(self._folder, known)
        files = tuf_client.download(info, held=held) if is_new else {}
        fetched = self._fetcher.fetched_bytes_total - before
        return Offer(
            keys=info.keys,
            release_version=info.release_version,
            rollback=info.rollback,
            serial=info.serial,
            fetched_bytes=fetched,
            files=files,
            signed_at=info.signed_at,
            expires=info.expires,
            helper=info.helper,
        )

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
        self._checked: dict[bytes, Offer] = {}

    def fetch(self, current_version: int, held: Held, known: Known) -> Offer:
        path = f"{tuf_client.METADATA_PATH}/timestamp.json"
        timestamp = b"".join(self._fetcher.fetch(path, limit_bytes=MAX_TIMESTAMP_BYTES))
        name = hashlib.sha256(timestamp).digest()
        if name not in self._checked:
            # Everything is fetched, whatever this device holds: the next one may hold nothing.
            offer = self._releases.fetch(0, lambda _: frozenset(), {})
            files = {key: read_source(source) for key, source in offer.files.items()}
            self._checked = {name: replace(offer, files=files)}
        offer = self._checked[name]
        if offer.release_version == current_version:
            return replace(offer, fetched_bytes=len(timestamp), files={})
        # What this device would have fetched by itself: the graphs only once, and nothing that it has.
        wanted = offer.files.keys() - (frozenset(GRAPH_FILES) if current_version else frozenset())
        missing = [read_source(offer.files[key]) for key in wanted]
        fetched = sum(len(data) for data in missing if hashlib.sha256(data).hexdigest() not in known)
        return replace(offer, fetched_bytes=len(timestamp) + fetched)

    def clear(self) -> None:
        """What is shared stays: another device may need it."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a release check led to.

    Attributes:
        signed_at, expires: of the newest metadata (unix seconds).
        installed: the new release and its loaded model, or None when there is nothing new.
        helper: the file that names the fleet's helper, or empty.
    """

    keys: OnlineKeys
    fetched_bytes: int
    signed_at: float
    expires: float
    installed: tuple[SlotContents, ServedModel] | None
    helper: bytes = b""


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

    def check(self, heads: Known = MappingProxyType({})) -> Checked:
        """Looks for a release and makes it current, on probation.

        Args:
            heads: checkpoints that this device has gathered, one of which may be the release's.

        Raises:
            ReleaseError: metadata or files that do not verify, or a release that may not follow.
            BundleError: a graph that may not be given to a runtime, or a file that is none of a release.
            TransportError: the repository cannot be reached.
            SelfTestError: the release does not answer as it was signed to.
            StorageError: the disk is full.
        """
        current = self._slots.current()
        version = current.version if current is not None else 0
        known = {**heads, **(_lasting_files(current) if current is not None else {})}
        offer = self._source.fetch(version, self._slots.held, known)
        found = Checked(offer.keys, offer.fetched_bytes, offer.signed_at, offer.expires, None, offer.helper)
        if not offer.files:
            return found
        refuse_strangers(offer.files)
        staged = self._slots.stage(offer.files, serial=offer.serial, rollback=offer.rollback)
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
        return replace(found, installed=(contents, self.load(contents)))

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


def _lasting_files(contents: SlotContents) -> dict[str, bytes]:
    """Files of a release that the next one often has too, by hash; without those that are damaged."""
    found = {}
    for name in (MANIFEST, GOLDEN_INPUTS):
        with contextlib.suppress(BundleError):
            data = contents.manifest.to_bytes() if name == MANIFEST else contents.read(name)
            found[hashlib.sha256(data).hexdigest()] = data
    return found
