"""The direction of imports and the one door per dependency (docs/architecture.md), checked on every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("wire", "process", "edge_agent", "models", "cloud_server", "fleet")

# package: what it may import of ours ("wire.errors" means that module alone)
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "wire": ("wire",),
    "process": ("process", "wire.errors"),
    "edge_agent": ("edge_agent", "wire", "process"),
    "models": ("models", "wire"),
    "cloud_server": ("cloud_server", "wire", "process", "models"),
    "fleet": PACKAGES,
}

# dependency: the files or folders that may import it
DOORS: dict[str, tuple[str, ...]] = {
    "paho": ("wire/transport/mqtt.py",),
    "iotcore": ("wire/transport/broker_process.py",),
    "cbor2": ("wire/cbor.py",),
    "cryptography": ("wire/primitives.py", "cloud_server/enrolment/ca.py"),
    "tuf": ("edge_agent/release/tuf_client.py", "cloud_server/release/"),
    "securesystemslib": ("edge_agent/release/tuf_client.py", "cloud_server/release/"),
    "onnxruntime": ("edge_agent/runtime.py", "models/ort.py"),
    "onnx": ("models/",),
    "onnxscript": ("models/",),
    "torch": ("models/", "cloud_server/aggregate/", "cloud_server/refine/"),
    "flwr": ("cloud_server/flower/", "fleet/chaos/server_app.py"),  # the second is a user's program
    "sqlalchemy": ("cloud_server/db/",),
    "alembic": ("cloud_server/db/",),
    "obstore": ("cloud_server/artefacts.py",),
    "ray": ("fleet/",),
    "dp_accounting": ("cloud_server/privacy/accountant.py",),
}
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}


def product_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(name: str, allowed: tuple[str, ...]) -> bool:
    return any((name + ".").startswith(prefix + ".") for prefix in allowed)


@pytest.mark.parametrize("path", product_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_rooms_and_the_doors(path: Path) -> None:
    where = path.relative_to(ROOT).as_posix()
    package = where.split("/")[0]
    for name in imported_names(path):
        top = name.split(".")[0]
        assert top not in FORBIDDEN, f"{where} imports {top}: no pickle, ever"
        if top in PACKAGES:
            assert is_within(name, MAY_IMPORT[package]), f"{where} must not import {name}"
        if top in DOORS:
            assert any(where.startswith(door) for door in DOORS[top]), f"{where} is a second door to {top}"
