"""Inputs that the coverage-guided fuzzer found worth keeping: one file for each decoder, one input in hex a line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus"
MAX_INPUTS = 40
MAX_INPUT_BYTES = 2048


def stored(name: str) -> list[bytes]:
    """The inputs that are kept for a decoder; none for a new one."""
    path = FOLDER / f"{name}.txt"
    return [bytes.fromhex(line) for line in path.read_text("ascii").split()] if path.exists() else []


def store(name: str, inputs: Iterable[bytes]) -> None:
    """Keeps the shortest of the inputs."""
    short = sorted(
        {data for data in inputs if 0 < len(data) <= MAX_INPUT_BYTES}, key=lambda data: (len(data), data)
    )
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.txt").write_text("".join(data.hex() + "\n" for data in short[:MAX_INPUTS]), "ascii")
