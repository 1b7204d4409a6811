"""How commands print: JSON for scripts, aligned columns for people.

Law of the file: what people read is made of the same values as what scripts read; control characters never
reach a terminal, since names and reasons may come from a peer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

MAX_CELL_CHARS = 60
_TIMES = ("_at", "_after", "created", "expires", "last_seen", "deadline", "started", "ended")


def print_json(value: Any) -> None:
    """One JSON document with sorted keys; in ASCII, which every pipe and terminal can carry."""
    print(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """The named values of each row, aligned under their names."""
    titles = [column.replace("_", " ").upper() for column in columns]
    lines = [titles, *([_cell(column, row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_facts(facts: Mapping[str, Any]) -> None:
    """One line of name and value each."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print(f"{name.replace('_', ' ').ljust(width)}  {_cell(name, value, limit=10_000)}".rstrip())


def say(text: str) -> None:
    """A line for the person at the terminal; never data."""
    print(text, file=sys.stderr)


def _cell(name: str, value: Any, *, limit: int = MAX_CELL_CHARS) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and _is_time(name):
        return _time(value)
    if isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, Mapping):
        inner = name if _is_time(name) else ""
        text = ", ".join(f"{key}={_cell(inner or key, item)}" for key, item in sorted(value.items())) or "-"
    elif isinstance(value, list | tuple):
        text = ", ".join(_cell(name, item) for item in value) or "-"
    else:
        text = str(value)
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _is_time(name: str) -> bool:
    return name == "at" or name.endswith(_TIMES)


def _time(seconds: float) -> str:
    return "-" if seconds <= 0 else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
