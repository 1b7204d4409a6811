"""Every queue, cache and pool of the product stands in docs/architecture.md, with the bound that the code has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("wire", "process", "edge_agent", "cloud_server")
KINDS = frozenset(
    {
        "deque",
        "OrderedDict",
        "Queue",
        "SimpleQueue",
        "LifoQueue",
        "PriorityQueue",
        "BoundedQueue",
        "ThreadPoolExecutor",
        "ProcessPoolExecutor",
        "HTTPServer",
        "ThreadingHTTPServer",
    }
)
_ROW = re.compile(r"^\| `([\w/]+\.py)` \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
_CONSTANT = re.compile(r"`(_?[A-Z][A-Z_]+)` ([\d,]+)")


def rows() -> list[tuple[str, str, str]]:
    """(file, what, bound) of the table."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.split("## Queues and their bounds")[1].split("\n## ")[0]
    return [(file, what, bound) for file, what, bound, _, _ in _ROW.findall(section)]


def made(tree: ast.AST) -> set[str]:
    """Names of attributes and variables that one of these is put into."""
    found = set()
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        if not targets or not any(_makes(inner) for inner in ast.walk(node)):
            continue
        for target in targets:
            if isinstance(target, ast.Attribute):
                found.add(target.attr)
            elif isinstance(target, ast.Name):
                found.add(target.id)
    return found


def constants(tree: ast.Module) -> dict[str, object]:
    """Numbers that a module gives names to; arithmetic of literals included."""
    found: dict[str, object] = {}
    for node in tree.body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign):
            target = node.targets[0]
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and value is not None and _is_number(value):
            found[target.id] = eval(compile(ast.Expression(value), "constant", "eval"), {"__builtins__": {}})
    return found


def _is_number(node: ast.AST) -> bool:
    parts = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
    return all(isinstance(inner, parts) for inner in ast.walk(node))


def _makes(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = node.func.value if isinstance(node.func, ast.Subscript) else node.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name in KINDS


def test_table_knows_every_queue_of_the_product() -> None:
    missing: list[str] = []
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            file = str(path.relative_to(ROOT))
            told = " ".join(what for name, what, _ in rows() if name == file)
            names = made(ast.parse(path.read_text(encoding="utf-8")))
            missing += [f"{file}: {name}" for name in names if f"`{name}`" not in told]
    assert missing == [], "give them a bound, and a row in docs/architecture.md, Queues and their bounds"


def test_walk_finds_a_queue_whatever_it_is_put_into() -> None:
    source = (
        "self._a: deque[int] = deque()\nb = queue.SimpleQueue()\nself.c = tuple(deque() for _ in x)\n"
        "self.d = BoundedQueue[int](1, 2, f)\nself.e = list()\nf = times.get(1, deque())\n"
    )
    assert made(ast.parse(source)) == {"_a", "b", "c", "d", "f"}


@pytest.mark.parametrize(("file", "bound"), [(file, bound) for file, _, bound in rows()])
def test_bound_of_the_table_is_that_of_the_code(file: str, bound: str) -> None:
    known = constants(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    for name, value in _CONSTANT.findall(bound):
        assert known[name] == int(value.replace(",", "")), f"{file}: {name}"


def test_table_names_no_file_or_attribute_that_is_gone() -> None:
    for file, what, _ in rows():
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", what):
            assert name in source, f"{file} has no {name}"
