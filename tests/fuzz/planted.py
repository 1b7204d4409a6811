"""Bugs that are planted one by one into a copy of the decoders, to see whether the fuzzer finds what it is for.

Each is one plausible slip: a check that was forgotten or is too weak. The copy runs in its own process with the same
seed and the same inputs as the run on the real decoders.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Bug:
    """A change to one file of `wire/`: `old` stands there exactly once."""

    name: str
    file: str
    old: str
    new: str


BUGS: tuple[Bug, ...] = (
    Bug("unprotected_header_is_ignored", "cose.py", "\n        or unprotected\n", "\n"),
    Bug("canonical_form_is_not_checked", "cbor.py", "if again != short or", "if again is None or"),
    Bug(
        "head_of_a_long_string_is_not_checked",
        "cbor.py",
        "data[item.head : item.start] != item.shortest_head",
        "item.start < item.head",
    ),
    Bug(
        "sender_is_not_compared",
        "envelope.py",
        "if signer.device != (",
        "if header.direction == 'down' and signer.device != (",
    ),
    Bug("critical_extension_passes", "cose.py", "any(number > 0 for", "any(number > 2**16 for"),
    Bug(
        "bytes_behind_the_records_pass",
        "envelope.py",
        "len(ciphertext) != records",
        "len(ciphertext) < records",
    ),
    Bug(
        "algorithm_may_be_a_list",
        "cose.py",
        "names.get(number) if type(number) is int else None",
        "names.get(number)",
    ),
    Bug("padding_need_not_fit_its_class", "records.py", " or size_class(marked) != len(plaintext)", ""),
    Bug("hash_of_a_record_is_not_compared", "envelope.py", "if sha256(ciphertext) != self", "if b'' == self"),
    Bug(
        "expiry_is_not_looked_at",
        "envelope.py",
        "header.expiry < earliest_expiry",
        "header.expiry < 0",
    ),
    Bug(
        "chunk_of_any_length_is_read",
        "chunks.py",
        "if not HEADER_BYTES < len(payload) <=",
        "if not 0 < len(payload) <=",
    ),
    Bug("scale_may_be_infinite", "codec.py", "if not np.isfinite(scales).all() or", "if"),
    Bug("name_may_end_in_a_newline", "manifest.py", "{0,63}\\Z", "{0,63}$"),
)

HARMLESS = Bug("nothing", "envelope.py", "if header.expiry and header.expiry <", "if 0 < header.expiry <")
"""Another way to write the same: a hunt that finds something in it would find something in anything."""


def hunt(bug: Bug, *, seed: int, count: int) -> dict[str, Any]:
    """Runs the fuzzer on a copy with the bug in it, until its first finding.

    Returns:
        The report of `python -m tests.fuzz --first`, with `wire` the folder that was really tested.
    """
    with tempfile.TemporaryDirectory(prefix="planted-") as name:
        copy = Path(name)
        for part in ("wire", "tests/wire", "tests/fuzz"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        path = copy / "wire" / bug.file
        text = path.read_text("utf-8")
        if text.count(bug.old) != 1:
            raise LookupError(f"{bug.name}: its line is no longer in wire/{bug.file}")
        path.write_text(text.replace(bug.old, bug.new), "utf-8")
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--first",
            "--json",
            f"--seed={seed}",
            f"--count={count}",
        ]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False, timeout=3600)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"the fuzzer broke on {bug.name}: {done.stderr[-2000:]}")
        report: dict[str, Any] = json.loads(done.stdout)
        if not Path(report["wire"]).is_relative_to(copy):
            raise RuntimeError(f"the fuzzer tested {report['wire']}, not the copy")
        return report
