"""What the documents tell their readers to type: console blocks, files to write, and what to wait for.

A reader sees the blocks; four comments, which nobody sees, tell a machine what a reader does by himself:

    <!-- file: NAME -->            the next block is the content of this file
    <!-- wait-for: COMMAND -->     until this succeeds
    <!-- wait-for-port: N -->      until somebody listens there
    <!-- not here: REASON -->      the next block cannot be run by a test
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(
        path for path in (ROOT / "docs").rglob("*.md") if path.name not in ("protocol.md", "architecture.md")
    ),
)
WITH_LINKS = (
    *DOCUMENTS,
    ROOT / "docs" / "architecture.md",
    ROOT / "docs" / "protocol.md",
    ROOT / "SECURITY.md",
)
_PART = re.compile(
    r"^<!-- (?P<order>file|wait-for|wait-for-port|not here): (?P<value>.*?) -->$"
    r"|^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do.

    Attributes:
        kind: `run`, `file`, `wait-for` or `wait-for-port`.
        value: name of the file, command, or port; empty for `run`.
        text: what is typed, or what is in the file.
        line: where it stands in the document.
    """

    kind: str
    value: str
    text: str
    line: int


def steps(document: Path) -> Iterator[Step]:
    """What a document says to do, in order."""
    text = document.read_text(encoding="utf-8")
    order = ("", "")
    for part in _PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 1
        if part["order"] in ("wait-for", "wait-for-port"):
            yield Step(part["order"], part["value"], "", line)
        elif part["order"]:
            order = (part["order"], part["value"])
        else:
            if order[0] == "file":
                yield Step("file", order[1], part["text"], line)
            elif part["language"] == "console" and order[0] != "not here":
                yield Step("run", "", part["text"], line)
            order = ("", "")


def commands(document: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of every command of a console block, also of those that no test runs."""
    text = document.read_text(encoding="utf-8")
    for part in _PART.finditer(text):
        if part["language"] == "console":
            first = text.count("\n", 0, part.start()) + 2
            joined = re.sub(r"\\\n\s*", " ", part["text"])
            for number, line in enumerate(joined.splitlines(), start=first):
                if line.strip() and not line.lstrip().startswith("#"):
                    yield number, line.strip()
