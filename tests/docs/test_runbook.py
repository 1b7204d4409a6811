"""docs/runbook.md names a test for every procedure, and each of them exists."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.documents import ROOT

TEXT = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
SECTIONS = re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
ROWS = [
    line
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith(("| key", "| procedure"))
]


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_named_tests_exist(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert {name for named, name in NAMED if named == file} <= there


@pytest.mark.parametrize(("title", "text"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_every_section_names_a_test(title: str, text: str) -> None:
    assert re.search(r"`tests/[\w/]+\.py::test_\w+`", text)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:40])
def test_every_procedure_names_a_test(row: str) -> None:
    last = row.rstrip("| ").rpartition("|")[2]
    assert re.search(r"`tests/[\w/]+\.py::test_\w+`", last) or last.strip() == "the rows above"
