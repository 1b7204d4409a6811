"""The bill of materials names what is installed, once each, and everything that it depends on."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "sbom.py"


def made(*extras: str) -> Any:
    out = subprocess.run([sys.executable, str(SCRIPT), *extras], check=True, capture_output=True, text=True)
    return json.loads(out.stdout)


@pytest.mark.parametrize(
    ("extras", "inside", "outside"),
    [
        ((), {"cryptography", "onnxruntime", "tuf"}, {"torch", "flwr"}),
        (("cloud",), {"torch", "flwr", "tuf"}, {"ruff"}),
    ],
)
def test_bill_names_what_is_installed_and_no_more(
    extras: tuple[str, ...], inside: set[str], outside: set[str]
) -> None:
    bill = made(*extras)
    listed = {each["name"]: each["version"] for each in bill["components"]}
    assert inside <= set(listed)
    assert not outside & set(listed)
    assert {name: version(name) for name in inside} == {name: listed[name] for name in inside}
    references = [each["bom-ref"] for each in (*bill["components"], bill["metadata"]["component"])]
    assert len(references) == len(set(references))
    assert {each["ref"] for each in bill["dependencies"]} == set(references)
    assert {ref for each in bill["dependencies"] for ref in each["dependsOn"]} <= set(references)


def test_bill_of_the_same_environment_is_the_same() -> None:
    assert made() == made()
