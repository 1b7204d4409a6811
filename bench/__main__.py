"""`python -m bench`: every benchmark in one run, one table on stdout, JSON beside it."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from bench.table import Row, render

ALL = ("sealing", "enrolment", "folding", "train_step", "gpu", "memory", "flower", "learning")
BY_NAME = ("learning_fashion", "robustness", "masking", "cards", "inference", "reconnect", "reconnect_broker")


def main() -> int:
    """Runs the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)} (default: these), {', '.join(BY_NAME)}"
    )
    parser.add_argument(
        "--requests", type=int, default=10_000, help="inference: in each kind of phase (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for bench.json")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - {*ALL, *BY_NAME})
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(ALL)}")
    rows: list[Row] = []
    for name in arguments.names or ALL:
        print(f"measuring {name}", file=sys.stderr)
        given = {"requests": arguments.requests} if name == "inference" else {}
        rows += importlib.import_module(f"bench.{name}").measure(**given)
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps([row.as_json() for row in rows], indent=2) + "\n"
    (arguments.out / "bench.json").write_text(text, encoding="utf-8")
    print(render(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
