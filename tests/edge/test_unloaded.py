"""A module that is left unloaded loads when somebody looks into it, and not before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import sys
from edge_agent.unloaded import leave_unloaded
leave_unloaded("urllib.request")
"""


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("import urllib.request, urllib.parse\nprint('http.client' in sys.modules)", "False"),
        ("import wire.transport.mqtt\nprint('http.client' in sys.modules)", "False"),
        ("import urllib.request\nprint(urllib.request.Request('http://a/b').host)", "a"),
        ("from urllib.request import Request\nprint(Request('http://a/b').host)", "a"),
        (
            "import urllib.request as first\nprint(first.Request is sys.modules['urllib.request'].Request)",
            "True",
        ),
        ("import urllib.request\nprint(hasattr(urllib.request, 'no_such'))", "False"),
    ],
)
def test_module_is_loaded_by_the_first_look_into_it(program: str, printed: str) -> None:
    assert _printed(BEGIN + program) == printed


def test_module_that_is_loaded_already_stays() -> None:
    program = "import urllib.request\nbefore = urllib.request\n" + BEGIN + "print(urllib.request is before)"
    assert _printed(program) == "True"


def _printed(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()
