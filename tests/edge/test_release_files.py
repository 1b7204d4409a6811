"""What a release may bring: every graph is looked into, and every name is known, before a runtime sees a byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_agent.release.files import read_contents, reader_of, refuse_strangers, verify_complete
from edge_agent.release.memory_slots import MemorySlots, SharedReleases
from edge_agent.release.slots import Slots
from tests.edge.tiny_release import tiny_release
from wire.errors import BundleError
from wire.manifest import GRAPH_FILES, MANIFEST, RELEASE, TEMPLATE, TRAIN_SGD, FileRef, Manifest

EXTERNAL = bytes([0x70, 1])  # data_location: external
SPARSE = bytes([0x7A, 0])  # a sparse initializer of a graph


def field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data


def graph_of(
    tensor_end: bytes = b"", graph_end: bytes = b"", *, opset: int = 18, domain: bytes = b""
) -> bytes:
    tensor = bytes([0x08, 1, 0x10, 1]) + field(9, bytes(4)) + tensor_end
    imported = (field(1, domain) if domain else b"") + bytes([0x10, opset])
    return bytes([0x08, 8]) + field(8, imported) + field(7, field(5, tensor) + graph_end)


def release_with(name: str, data: bytes) -> dict[str, bytes]:
    """Release 1 with another graph file, which manifest and release name by its hash: as if it were signed."""
    release, files = tiny_release(1)
    manifest = Manifest.from_bytes(files[MANIFEST])
    refs = tuple(FileRef.of(name, data) if ref.name == name else ref for ref in manifest.files)
    changed = replace(manifest, files=refs)
    files |= {name: data, MANIFEST: changed.to_bytes()}
    return files | {RELEASE: replace(release, graphs_sha256=changed.graphs_sha256).to_bytes()}


def test_signed_release_with_harmless_graphs_is_complete() -> None:
    contents = read_contents(reader_of(release_with(TRAIN_SGD, graph_of())))
    assert len(verify_complete(contents)) == len(tiny_release(1)[1][TEMPLATE])


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (graph_of(EXTERNAL), "another file"),
        (graph_of(field(13, b"")), "another file"),
        (graph_of(bytes([0x08, 200, 1])), "another size"),
        (graph_of(graph_end=SPARSE), "field 15"),
        (graph_of(opset=99), "operator set 99"),
        (graph_of(domain=b"com.evil"), "com.evil"),
        (b"not a graph", "model"),
    ],
)
@pytest.mark.parametrize("slots", ["folder", "memory"])
def test_signed_graph_that_may_not_reach_a_runtime_is_refused(
    tmp_path: Path, graph: bytes, reason: str, slots: str
) -> None:
    store = Slots(tmp_path) if slots == "folder" else MemorySlots(SharedReleases())
    with pytest.raises(BundleError, match=reason):
        store.stage(release_with(TRAIN_SGD, graph))
    assert store.current() is None
    store.promote(store.stage(tiny_release(1)[1]))
    assert store.current() is not None


@pytest.mark.parametrize("name", ["evil.so", "../current/int8.onnx", "weights.bin", "int8.onnx"])
def test_file_that_is_none_of_a_release_is_refused(name: str) -> None:
    refuse_strangers([*GRAPH_FILES, MANIFEST, RELEASE])
    with pytest.raises(BundleError, match="a release has no file"):
        refuse_strangers([*GRAPH_FILES, name])
