"""A bundle is refused at its import for what devices would refuse: files that nobody named, graphs that need others."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.bundle import Bundle
from tests.cloud import small_bundle
from tests.cloud.small_bundle import empty_graph, write_bundle
from wire.errors import BundleError

EXTERNAL_TENSOR = bytes([0x2A, 6, 0x08, 0, 0x10, 1, 0x70, 1])


@pytest.mark.parametrize("name", ["weights.bin", "template.onnx.data", ".hidden", "run.py"])
def test_bundle_with_a_file_that_nobody_named_is_refused(tmp_path: Path, name: str) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    (bundle.folder / name).write_bytes(b"x")
    with pytest.raises(BundleError, match="neither manifest nor release names"):
        Bundle.open(bundle.folder)
    (bundle.folder / name).unlink()
    assert Bundle.open(bundle.folder).manifest == bundle.manifest


def test_bundle_whose_graph_needs_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_external_data(text: str) -> bytes:
        return empty_graph(text)[:-1] + bytes([len(EXTERNAL_TENSOR)]) + EXTERNAL_TENSOR

    monkeypatch.setattr(small_bundle, "empty_graph", with_external_data)
    with pytest.raises(BundleError, match="another file"):
        write_bundle(tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
