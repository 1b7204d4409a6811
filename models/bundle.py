"""A bundle on disk: graphs, manifest, first release, and what only the cloud needs.

Laws of the file: `open` trusts no byte that the manifest or the release does not name by hash; a bundle
appears whole or not at all. Source: docs/architecture.md, "Bundle, checkpoint, release".

    manifest.json  template.onnx  float32.onnx  train_sgd.onnx  train_adam.onnx      graphs: fixed
    release.json   checkpoint.bin  golden_inputs.bin  golden_outputs.bin             the first parameters
    ranges.onnx    calibration.bin                                                   for the cloud only
    CARD.md                                                                          for people
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wire import manifest as names
from wire.checkpoint import Checkpoint
from wire.errors import BundleError
from wire.manifest import FileRef, Manifest, Release
from wire.onnx_file import check_onnx

Floats = npt.NDArray[np.float32]

CALIBRATION = "calibration.bin"
_HINT = "build the bundle again with `shoal-cloud model build`"


@dataclass(frozen=True, eq=False)
class Bundle:
    """An opened bundle; files are read, and checked again, when they are asked for.

    Attributes:
        folder: where it lies.
        manifest: the model's graphs.
        release: the first release: parameters for these graphs.
    """

    folder: Path
    manifest: Manifest
    release: Release

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Opens a bundle and checks every file.

        Raises:
            BundleError: (disk or operator) a file is missing, is not the one that was named, or was named by nobody;
                or a graph that devices would refuse (`wire/onnx_file.py`).
        """
        manifest = Manifest.from_bytes(_read(folder / names.MANIFEST, names.MAX_MANIFEST_BYTES))
        release = Release.from_bytes(_read(folder / names.RELEASE, names.MAX_RELEASE_BYTES))
        if release.graphs_sha256 != manifest.graphs_sha256:
            raise BundleError(f"{folder}: the release is for other graphs", hint=_HINT)
        bundle = cls(folder, manifest, release)
        bundle._refuse_strangers()
        for ref in bundle._refs().values():
            data = bundle.read(ref.name)
            if ref.name.endswith(".onnx"):
                check_onnx(data, ref.name)
        if bundle.checkpoint().sha256.hex() != release.checkpoint_sha256:
            raise BundleError(f"{folder}: the checkpoint is not the release's", hint=_HINT)
        return bundle

    @classmethod
    def write(
        cls, folder: Path, manifest: Manifest, release: Release, files: Mapping[str, bytes], card: str
    ) -> Bundle:
        """Writes a bundle into a new folder and opens it.

        Args:
            folder: must not exist yet, or be empty.
            files: every file but `manifest.json`, `release.json` and `CARD.md`, by name.

        Raises:
            BundleError: the folder is taken, or the files are not those that manifest and release name.
        """
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".bundle-", dir=folder.parent) as scratch:
                staged = Path(scratch, "bundle")
                staged.mkdir()
                (staged / names.MANIFEST).write_bytes(manifest.to_bytes())
                (staged / names.RELEASE).write_bytes(release.to_bytes())
                (staged / names.CARD).write_text(card, encoding="utf-8")
                for name, data in files.items():
                    (staged / name).write_bytes(data)
                cls.open(staged)
                os.rename(staged, folder)
        except OSError as error:
            raise BundleError(
                f"{folder} cannot be written: {error.strerror}", hint="name a folder that does not exist"
            ) from error
        return cls.open(folder)

    def read(self, name: str) -> bytes:
        """One file, as the manifest or the release names it.

        Raises:
            BundleError: no such file, or not the one that was named.
        """
        ref = self._refs().get(name)
        if name == names.CHECKPOINT:
            return _read(self.folder / name)
        if ref is None:
            raise BundleError(f"a bundle has no file {name}", name=name)
        data = _read(self.folder / name, ref.size_bytes)
        ref.check(data)
        return data

    def checkpoint(self) -> Checkpoint:
        """The parameters of the first release."""
        checkpoint = Checkpoint.from_bytes(self.read(names.CHECKPOINT))
        checkpoint.check(self.manifest)
        return checkpoint

    def calibration(self) -> Floats:
        """The operator's windows that activation ranges are measured on, float32 [N, *input_shape]."""
        return self._floats(CALIBRATION, self.manifest.input_shape)

    def golden_inputs(self) -> Floats:
        """Float32 [G, *input_shape]."""
        return self._floats(names.GOLDEN_INPUTS, self.manifest.golden_inputs_shape[1:])

    def golden_outputs(self) -> Floats:
        """Float32 [2, G, …]: answers of the int8 file, then of the float32 file."""
        return self._floats(names.GOLDEN_OUTPUTS, self.manifest.golden_outputs_shape[1:])

    def _floats(self, name: str, shape: tuple[int, ...]) -> Floats:
        data = self.read(name)
        if len(data) % (4 * prod(shape)):
            raise BundleError(f"{name} does not hold whole samples of {shape}", name=name)
        return np.frombuffer(data, "<f4").astype(np.float32).reshape(-1, *shape)

    def _refuse_strangers(self) -> None:
        named = {*self._refs(), names.MANIFEST, names.RELEASE, names.CHECKPOINT, names.CARD}
        try:
            strange = sorted({path.name for path in self.folder.iterdir()} - named)
        except OSError as error:
            raise BundleError(f"cannot read {self.folder}: {error.strerror}", hint=_HINT) from error
        if strange:
            raise BundleError(
                f"{self.folder} holds {strange[0]}, which neither manifest nor release names",
                hint="remove it, or build the bundle again",
                name=strange[0],
            )

    def _refs(self) -> dict[str, FileRef]:
        refs = (*self.manifest.files, *self.manifest.cloud_files)
        return {ref.name: ref for ref in (*refs, self.release.golden_inputs, self.release.golden_outputs)}


def _read(path: Path, limit_bytes: int = names.MAX_FILE_BYTES) -> bytes:
    try:
        if path.stat().st_size > limit_bytes:
            raise BundleError(f"{path} is longer than {limit_bytes} bytes", hint=_HINT, path=str(path))
        if path.exists() and not path.is_file():  # a pipe would be waited on for ever
            raise BundleError(f"{path} is not a file", hint=_HINT, path=str(path))
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}", hint=_HINT, path=str(path)) from error
