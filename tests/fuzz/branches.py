"""Which branches a run took of the functions that read what a peer sent, and of no others.

A function that is named here and does not exist is an error, so that the figure cannot rise by renaming.
"""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import coverage

import wire

FOLDER = Path(wire.__file__).parent
DECODING: dict[str, tuple[str, ...]] = {
    "cbor.py": (
        "decode_canonical", "decode_tagged", "_check_limit", "_decode", "_walk", "_argument", "_without", "_filled",
    ),
    "cose.py": (
        "Sign1.signed_bytes", "read_sign1", "read_content", "Recipient.kdf_info", "Encrypt.from_cbor",
        "RecordNames.nonce", "RecordNames.aad", "read_extensions", "_check_extensions", "_protected_map",
        "_read_protected", "_known",
    ),
    "envelope.py": (
        "Opening.open_record_into", "open_head", "open_sealed", "open_signed", "peek", "_split_frame", "_verified",
        "_read_header", "_accepted_header", "_expected_device", "_read_sizes",
    ),
    "header.py": ("header_from_map", "_checked"),
    "records.py": ("Records.count", "Records.is_last", "Records.plaintext_slice", "size_class", "unpadded_length"),
    "chunks.py": (
        "parse", "_piece_bytes", "_Transfer.is_of", "Reassembly.add", "Reassembly.missing", "Reassembly._open",
        "Reassembly._make_room",
    ),
    "blobs.py": ("BlobAssembly.__init__", "BlobAssembly.add", "BlobAssembly.result", "needed_chunks"),
    "codec.py": (
        "decode", "decode_into", "ErrorFeedback.from_bytes", "_parse", "_check_length", "_inflate", "_tiles",
        "_plain_tile", "_symbol_values",
    ),
    "messages.py": ("decode_body", "_convert"),
    "manifest.py": (
        "Manifest.from_bytes", "Manifest.check", "Release.from_bytes", "_from_json", "_check_slots", "_require",
    ),
    "manifest_layout.py": (
        "LayerSource.check", "Int8Layer.spans", "FloatTensor.check", "Float32Layer.spans", "Int8Layout.check",
        "Float32Layout.check", "_check_spans", "_require",
    ),
    "checkpoint.py": ("Checkpoint.__post_init__", "Checkpoint.from_bytes", "_array"),
    "patch.py": ("apply_patch", "_check_fields"),
    "enrolment.py": ("EnrolmentToken.parse", "decode_json"),
    "topics.py": ("Topics.parse", "_parse_levels"),
    "replay.py": ("Window.from_row",),
}  # fmt: skip


@dataclass
class Branches:
    """Taken and all branches, and the places of those that were not taken (`file:from->to`)."""

    taken: int = 0
    total: int = 0
    missed: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.taken / self.total if self.total else 0.0


@contextmanager
def measured() -> Iterator[Branches]:
    """Counts the branches that are taken inside the block; the figures are there when it ends."""
    branches, before = Branches(), _sources()
    tool = coverage.Coverage(branch=True, include=[str(FOLDER / "*.py")], data_file=None, config_file=False)
    tool.start()
    try:
        yield branches
    finally:
        tool.stop()
    if _sources() != before:
        raise RuntimeError("the decoders were changed while they were measured: run again")
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        tool.json_report(outfile=report.name)
        files = json.load(report)["files"]
    for name, functions in DECODING.items():
        (path,) = (path for path in files if path.endswith(f"wire/{name}"))
        lines = _lines(FOLDER / name, functions)
        taken = [arc for arc in files[path]["executed_branches"] if arc[0] in lines]
        missed = [arc for arc in files[path]["missing_branches"] if arc[0] in lines]
        branches.taken += len(taken)
        branches.total += len(taken) + len(missed)
        branches.missed += [f"{name}:{start}->{end}" for start, end in missed]


def _sources() -> list[bytes]:
    return [(FOLDER / name).read_bytes() for name in DECODING]


def _lines(path: Path, functions: tuple[str, ...]) -> set[int]:
    """The lines of the functions of these qualified names."""
    found: dict[str, range] = {}

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                found[prefix + child.name] = range(child.lineno, (child.end_lineno or child.lineno) + 1)

    walk(ast.parse(path.read_text("utf-8")), "")
    missing = [name for name in functions if name not in found]
    if missing:
        raise LookupError(
            f"{path.name} has no function {missing[0]}: name its successor in tests/fuzz/branches.py"
        )
    return {line for name in functions for line in found[name]}
