"""The files of one release as a device holds them, and the rules about which release may come after which.

Laws of the file: a file is given out only after its hash was compared with what was signed; no release is
older than one that ran here, unless a signed rollback says so (law 5); a release that failed here is not
tried again. Nothing here touches a disk: `slots.py` (folders) and `memory_slots.py` (simulation) share it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from wire.checkpoint import Checkpoint
from wire.errors import BundleError, ReleaseError, StorageError
from wire.manifest import (
    CHECKPOINT,
    FLOAT32,
    GOLDEN_INPUTS,
    GOLDEN_OUTPUTS,
    GRAPH_FILES,
    MANIFEST,
    RELEASE,
    TEMPLATE,
    FileRef,
    Manifest,
    Release,
)
from wire.materialize import materialize_float32, materialize_int8
from wire.onnx_file import check_onnx

INT8: Final = "int8.onnx"
MAX_REFUSED: Final = 32
FILES: Final = frozenset((RELEASE, MANIFEST, CHECKPOINT, GOLDEN_INPUTS, GOLDEN_OUTPUTS, *GRAPH_FILES))
"""What a release consists of, and nothing else."""
FileSource = bytes | Path

_HexOrNone = Annotated[str, Meta(pattern=r"^(?:[0-9a-f]{64})?\Z")]


@dataclass(frozen=True)
class SlotContents:
    """One release that is complete and was verified when it was put here. Files are read (and checked) on
    demand.

    Attributes:
        release_sha256: hex SHA-256 of `release.json`: the release's identity.
        reader: the raw bytes of a file by name; raises OSError when it is not there.
    """

    manifest: Manifest
    release: Release
    release_sha256: str
    reader: Callable[[str], bytes] = field(repr=False, compare=False)

    @property
    def version(self) -> int:
        return self.release.version

    @property
    def graphs_sha256(self) -> str:
        return self.release.graphs_sha256

    def read(self, name: str) -> bytes:
        """One file: `int8.onnx`, `checkpoint.bin`, a golden file or a graph file.

        Raises:
            BundleError: unknown, missing, or not the bytes that were signed for.
        """
        try:
            data = self.reader(name)
        except OSError as error:
            raise BundleError(
                f"{name} of release {self.version} cannot be read: {error}", name=name
            ) from error
        self._expected(name).check(data)
        return data

    def int8(self) -> bytes:
        """The int8 model file; raises like `read`."""
        return self.read(INT8)

    def float32(self) -> bytes:
        """The float32 model file, put together from its template; raises like `read`."""
        data = materialize_float32(self.read(FLOAT32), self.manifest, self.checkpoint())
        if hashlib.sha256(data).hexdigest() != self.release.float32_sha256:
            raise BundleError(
                f"the float32 file of release {self.version} is not the one that was signed for"
            )
        return data

    def rebuild_int8(self) -> bytes:
        """The int8 model file, put together from template and checkpoint again; raises like `read`."""
        data = materialize_int8(self.read(TEMPLATE), self.manifest, self.checkpoint())
        if hashlib.sha256(data).hexdigest() != self.release.int8_sha256:
            raise BundleError(f"the int8 file of release {self.version} is not the one that was signed for")
        return data

    def checkpoint(self) -> Checkpoint:
        """The release's parameters; raises like `read`."""
        return Checkpoint.from_bytes(self.read(CHECKPOINT))

    def _expected(self, name: str) -> _Expectation:
        release = self.release
        if name == INT8:
            return _Expectation(name, release.int8_sha256)
        if name == CHECKPOINT:
            return _Expectation(name, release.checkpoint_sha256)
        refs = {GOLDEN_INPUTS: release.golden_inputs, GOLDEN_OUTPUTS: release.golden_outputs}
        ref: FileRef = refs.get(name) or self.manifest.file(name)
        return _Expectation(name, ref.sha256)


@dataclass(frozen=True, slots=True)
class _Expectation:
    name: str
    sha256: str

    def check(self, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise BundleError(f"{self.name} is not the file that was signed for", name=self.name)


@dataclass(frozen=True)
class StagedRelease:
    """A release that is complete and verified, and waits for its self-test. `serial` is that of its ring
    file.
    """

    contents: SlotContents
    serial: int = 0
    rollback: bool = False

    @cached_property
    def release(self) -> Release:
        return self.contents.release


class Standing(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a device remembers of its releases, beside the files (`STATE.json`).

    Attributes:
        probation: release that serves but was not confirmed yet (hex hash of `release.json`), or empty.
        floor_version: nothing older is staged without a signed rollback.
        serial: newest ring file that was followed.
        refused: releases that failed here, newest last.
    """

    format: Annotated[int, Meta(ge=1, le=1)] = 1
    probation: _HexOrNone = ""
    floor_version: Annotated[int, Meta(ge=0, le=2**53)] = 0
    serial: Annotated[int, Meta(ge=0, le=2**53)] = 0
    refused: Annotated[tuple[_HexOrNone, ...], Meta(max_length=MAX_REFUSED)] = ()

    def check(self, staged: StagedRelease) -> None:
        """Whether this release may follow.

        Raises:
            ReleaseError: (peer or us) older than one that ran here, from an older ring file, or refused here.
        """
        version, name = staged.contents.version, staged.contents.release_sha256
        if staged.serial < self.serial:
            raise ReleaseError(
                "the ring file is older than one that was followed", serial=staged.serial, floor=self.serial
            )
        if version < self.floor_version and not staged.rollback:
            raise ReleaseError(
                f"release {version} is older than {self.floor_version}, which ran here",
                hint="a rollback has to be signed: shoal-cloud release rollback",
                version=version,
                floor=self.floor_version,
            )
        if name in self.refused:
            raise ReleaseError(f"release {version} failed on this device before", version=version)

    def promoted(self, staged: StagedRelease) -> Standing:
        return msgspec.structs.replace(
            self,
            probation=staged.contents.release_sha256,
            floor_version=staged.contents.version,
            serial=max(self.serial, staged.serial),
        )

    def confirmed(self) -> Standing:
        return msgspec.structs.replace(self, probation="")

    def rolled_back(self, release_sha256: str) -> Standing:
        kept = tuple(name for name in self.refused if name != release_sha256)[-(MAX_REFUSED - 1) :]
        return msgspec.structs.replace(self, probation="", refused=(*kept, release_sha256))

    def to_bytes(self) -> bytes:
        """One line of JSON and one with its SHA-256: a flipped bit must not lower the version floor."""
        line = msgspec.json.encode(self)
        return line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Standing:
        """Reads `STATE.json`.

        Raises:
            StorageError: (disk) damaged.
        """
        line, _, digest = data.rstrip(b"\n").partition(b"\n")
        if hashlib.sha256(line).hexdigest().encode() != digest:
            raise StorageError("the state of the slots does not match its digest")
        try:
            return msgspec.json.decode(line, type=cls, strict=True)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise StorageError("the state of the slots is damaged") from error


def read_contents(reader: Callable[[str], bytes]) -> SlotContents:
    """Reads manifest and release, and whether they belong together; no other file is read.

    Raises:
        BundleError: missing, damaged, or of two models.
    """
    try:
        manifest_bytes, release_bytes = reader(MANIFEST), reader(RELEASE)
    except OSError as error:
        raise BundleError(f"a release is not complete: {error}") from error
    manifest = Manifest.from_bytes(manifest_bytes)
    release = Release.from_bytes(release_bytes)
    if hashlib.sha256(manifest_bytes).hexdigest() != release.graphs_sha256:
        raise BundleError(f"release {release.version} is not for the graphs of {manifest.model}")
    return SlotContents(manifest, release, hashlib.sha256(release_bytes).hexdigest(), reader)


def verify_complete(contents: SlotContents) -> bytes:
    """Checks every file of a new release against what was signed, and every graph before a runtime sees it; returns
    its int8 model file.

    Raises:
        BundleError: a file is missing, is not what was signed for, or is a graph that needs or claims what it may
            not (`wire/onnx_file.py`).
    """
    for name in (*GRAPH_FILES, GOLDEN_INPUTS, GOLDEN_OUTPUTS):
        data = contents.read(name)
        if name in GRAPH_FILES:
            check_onnx(data, name)
    contents.checkpoint().check(contents.manifest)
    int8 = contents.rebuild_int8()
    # The manifest says where parameters are put: what comes out must be as harmless as what went in.
    check_onnx(int8, INT8)
    check_onnx(contents.float32(), FLOAT32)
    return int8


def refuse_strangers(names: Iterable[str]) -> None:
    """Makes sure that nothing else is handed over than what a release consists of.

    Raises:
        BundleError: another file.
    """
    strange = sorted(set(names) - FILES)
    if strange:
        raise BundleError(f"a release has no file {strange[0][:80]!r}", name=strange[0][:80])


def read_source(source: FileSource) -> bytes:
    """The bytes of a file that is handed over as bytes or as a path."""
    return source if isinstance(source, bytes) else source.read_bytes()


def reader_of(files: Mapping[str, FileSource]) -> Callable[[str], bytes]:
    """A reader over files by name; a missing one is a FileNotFoundError, as on a disk."""

    def read(name: str) -> bytes:
        if name not in files:
            raise FileNotFoundError(name)
        return read_source(files[name])

    return read
