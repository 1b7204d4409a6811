"""docs/threat-model.md names tests that exist, for every attack that it says is stopped."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.documents import ROOT

TEXT = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)


def rows() -> list[list[str]]:
    """Cells of every row of the tables with a column `shown by`."""
    found = []
    for head, body in re.findall(
        r"^(\|[^\n]*\| shown by \|)\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", TEXT, re.MULTILINE
    ):
        columns = head.count("|") - 1
        for line in body.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == columns, line
            found.append(cells)
    return found


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_named_tests_exist(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert {name for named, name in NAMED if named == file} <= there


@pytest.mark.parametrize("cells", rows(), ids=lambda cells: cells[0][:60])
def test_every_attack_that_is_stopped_names_its_test(cells: list[str]) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", cells[-1])
    assert named
    assert cells[-1] == ", ".join(f"`{each}`" for each in named)


def test_every_word_of_a_test_in_the_document_is_read() -> None:
    """A name in another form would never be checked."""
    assert TEXT.count("::test_") == len(NAMED)
    assert len(rows()) > 40


def test_what_is_not_defended_is_said() -> None:
    left = TEXT.partition("\n## Not defended")[2]
    assert len(re.findall(r"^- \*\*", left, re.MULTILINE)) >= 8
