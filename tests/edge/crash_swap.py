"""Kills a process at each of its file operations in turn, while it swaps releases; prints what the next start
finds.

Run as a program by test_slots.py (one thread only, so that it may fork): `python -m tests.edge.crash_swap
FOLDER ACT`. The kill is real: an audit hook ends the child with `os._exit` just before the Nth operation on
files.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from edge_agent.release.slots import Slots
from tests.edge.tiny_release import tiny_release

OPERATIONS = frozenset(
    {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.chmod"}
)
KILLED = 9


def prepare(folder: Path) -> None:
    """Release 1 is factory and last good, release 2 current."""
    slots = Slots(folder)
    for version in (1, 2):
        slots.promote(slots.stage(tiny_release(version)[1], serial=version))
        slots.confirm()


def act(folder: Path, what: str) -> None:
    slots = Slots(folder)
    if what == "promote":
        slots.promote(slots.stage(tiny_release(3)[1], serial=3))
    else:
        slots.roll_back()


def killed_at(folder: Path, what: str, number: int) -> bool:
    """Runs the act in a child that dies before its operation `number`; False when it needed fewer."""
    child = os.fork()
    if child == 0:
        left = number

        def die(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in OPERATIONS:
                left -= 1
                if left == 0:
                    os._exit(KILLED)

        sys.addaudithook(die)
        act(folder, what)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


def found(folder: Path) -> dict[str, Any]:
    slots = Slots(folder)
    contents = slots.current()
    if contents is None:
        return {"version": 0}
    contents.int8()
    return {
        "version": contents.version,
        "on_probation": slots.on_probation,
        "trains": bool(contents.float32()),
        "refused": len(slots.standing.refused),
        "left": sorted(path.name for path in (folder / "slots").iterdir() if path.name.startswith(".")),
        "quarantine": (folder / "quarantine").exists(),
    }


def main(folder: Path, what: str) -> None:
    prepare(folder / "start")
    results = []
    number = 0
    is_killed = True
    while is_killed:
        number += 1
        place = folder / "crash"
        shutil.copytree(folder / "start", place)
        is_killed = killed_at(place, what, number)
        first = found(place)
        if what == "promote":
            # Whatever the crash left, the same release can be installed after it.
            slots = Slots(place)
            slots.promote(slots.stage(tiny_release(3)[1], serial=3))
            first["again"] = found(place)["version"]
        results.append(first)
        shutil.rmtree(place)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
