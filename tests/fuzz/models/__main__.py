"""`python -m tests.fuzz.models`: mutated models, signed rightly, on their way through a device.

Ends with 0 if no agent died, else with 1 and the numbers of the trials that killed one. It goes on where an earlier run
with the same seed ended; `--number` plays one trial again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz.models.campaign import all_seeds, run, table, trial


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz.models", description=__doc__)
    parser.add_argument(
        "--count", type=int, default=10_000, help="mutants that reach the runtime (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--by-hand", action="store_true", help="leave the models of the zoo out")
    parser.add_argument("--number", type=int, help="play this trial alone and say how it ended")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    zoo = None if arguments.by_hand else arguments.out / "seeds"
    if arguments.number is not None:
        print(trial(arguments.seed, arguments.number, all_seeds(zoo)))
        return 0
    kind = "by-hand" if arguments.by_hand else "zoo"
    trials = run(
        arguments.out / f"models-{arguments.seed}-{kind}.jsonl",
        seed=arguments.seed,
        count=arguments.count,
        workers=arguments.workers,
        zoo=zoo,
    )
    print(table(trials))
    deaths = [each for each in trials if each.is_death]
    for each in deaths:
        print(f"trial {each.number} ({each.seed}, {each.change}): {each.reason}", file=sys.stderr)
    return 1 if deaths else 0


if __name__ == "__main__":
    sys.exit(main())
