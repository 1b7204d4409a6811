"""Writes `deploy/locks/`: every package of the images, with its version and the hashes of its files.

Laws of the file: versions come from `constraints.txt`, the set that was tested, so a lock says no other than it does;
no address of an index is written, since hashes make it no matter where a file comes from; what an accelerator decides
(torch and the libraries it brings) has a lock of its own, so that another one can stand in its place. Needs uv
(`pip install uv`) and a package index. Sources: https://pip.pypa.io/en/stable/topics/secure-installs/,
docs/how-to/containers.md. Run it as `python deploy/lock.py` after a change of either file.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "deploy" / "locks"
IMAGES = {"edge": (), "cloud": ("cloud", "postgres")}
_ACCELERATOR = re.compile(r"(?:torch|triton|nvidia-.*|cuda-.*)")
_HEAD = "# Made by deploy/lock.py from pyproject.toml and constraints.txt; {what}.\n"


def main() -> int:
    uv = shutil.which("uv")
    if uv is None:
        print("error: there is no uv on PATH", file=sys.stderr)
        print("hint: pip install uv, then run this again", file=sys.stderr)
        return 2
    LOCKS.mkdir(exist_ok=True)
    for image, extras in IMAGES.items():
        entries = split(compiled(uv, extras))
        torch = {name: text for name, text in entries.items() if _ACCELERATOR.fullmatch(name)}
        rest = {name: text for name, text in entries.items() if name not in torch}
        write(image, f"everything of the {image} image" + (" but torch" if torch else ""), rest)
        if torch:
            write("torch", "torch as the public index has it, with the libraries that its GPUs need", torch)
    return 0


def compiled(uv: str, extras: tuple[str, ...]) -> str:
    """What the base install with these extras needs, and what builds it, on every platform."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        builds = tomllib.load(file)["build-system"]["requires"]
    with tempfile.TemporaryDirectory() as scratch:
        build = Path(scratch) / "build.in"
        build.write_text("\n".join(builds) + "\n", encoding="utf-8")
        command = [
            *(
                uv,
                "pip",
                "compile",
                "--quiet",
                "--universal",
                "--python-version",
                "3.11",
                "--generate-hashes",
            ),
            *("--no-header", "--no-annotate", "--no-config", "--constraint", "constraints.txt"),
            *(word for extra in extras for word in ("--extra", extra)),
            *("pyproject.toml", str(build)),
        ]
        return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def split(text: str) -> dict[str, str]:
    """The entries of a requirements file (the line of a package and those of its hashes), by package."""
    entries: dict[str, str] = {}
    for entry in re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE):
        if entry.strip():
            entries[re.split(r"[=;\s]", entry, maxsplit=1)[0]] = entry
    return entries


def write(name: str, what: str, entries: dict[str, str]) -> None:
    text = _HEAD.format(what=what) + "".join(entries[each] for each in sorted(entries))
    (LOCKS / f"{name}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
