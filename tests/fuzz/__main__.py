"""`python -m tests.fuzz`: hostile envelopes, hostile inputs for every decoder, branch coverage and planted bugs.

Ends with 0 if nothing was accepted, nothing but our own errors came out, the branches were reached and every planted
bug was found; else with 1. What was found is written to build/fuzz/.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import wire
from tests.fuzz.branches import measured
from tests.fuzz.campaign import Result, attack_decoders, attack_envelopes
from tests.fuzz.planted import BUGS, hunt

MEASURED_COUNT = 20_000
"""Envelopes that are opened while branches are counted, which takes twice as long; the rest only adds to them."""
GOAL_SHARE = 0.95
HUNT_COUNT = 100_000
"""Envelopes that a hunt for a planted bug opens at most: the same as the first ones of a longer run."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="hostile envelopes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--planted", action="store_true", help="look for the planted bugs too")
    parser.add_argument("--first", action="store_true", help="stop at the first finding, count no branches")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    report = run(arguments.seed, arguments.count, arguments.workers, stops_at_first=arguments.first)
    if arguments.planted:
        report["planted"] = _hunted(report, arguments.seed, min(arguments.count, HUNT_COUNT))
    print(json.dumps(report) if arguments.json else rendered(report))
    return 1 if problems(report) else 0


def _hunted(report: dict[str, Any], seed: int, count: int) -> dict[str, int]:
    """After how many inputs each planted bug was found. Takes minutes: what the run found is said before."""
    print(rendered(report), file=sys.stderr)
    found = {}
    for bug in BUGS:
        found[bug.name] = found_after(hunt(bug, seed=seed, count=count))
        print(f"{bug.name}: {found[bug.name] or 'missed'}", file=sys.stderr)
    return found


def run(seed: int, count: int, workers: int = 1, *, stops_at_first: bool = False) -> dict[str, Any]:
    """One run: all decoders, then `count` envelopes of which the first are measured."""
    each = max(1500, count // 50)
    report: dict[str, Any] = {"seed": seed, "wire": str(Path(wire.__file__).parent)}
    if stops_at_first:
        decoders = attack_decoders(seed, each, stops_at_first=True)
        envelopes = Result() if decoders.findings else attack_envelopes(seed, count, stops_at_first=True)
    else:
        with measured() as branches:
            decoders = attack_decoders(seed, each)
            envelopes = attack_envelopes(seed, min(count, MEASURED_COUNT))
        report["branches"] = {"taken": branches.taken, "total": branches.total, "missed": branches.missed}
        envelopes.add(_unmeasured(seed, count - envelopes.count, workers))
    return report | {"decoders": vars(decoders), "envelopes": vars(envelopes)}


def _unmeasured(seed: int, count: int, workers: int) -> Result:
    """The rest of the envelopes, from further seeds."""
    result = Result()
    if count <= 0:
        return result
    shares = [count // workers + (number < count % workers) for number in range(workers)]
    seeds = [seed * 1000 + number + 1 for number in range(workers)]
    if workers == 1:
        return attack_envelopes(seeds[0], count)
    with ProcessPoolExecutor(workers) as pool:
        for part in pool.map(attack_envelopes, seeds, shares):
            result.add(part)
    return result


def found_after(report: dict[str, Any]) -> int:
    """After how many inputs a hunt had its first finding; 0 if it had none."""
    decoders, envelopes = report["decoders"], report["envelopes"]
    return int(
        decoders["first_at"] or (decoders["count"] + envelopes["first_at"] if envelopes["first_at"] else 0)
    )


def problems(report: dict[str, Any]) -> list[str]:
    """What a run must not show, in words; nothing if all is well."""
    found = [
        f"{finding['where']}: {finding['what']}"
        for part in ("decoders", "envelopes")
        for finding in report[part]["findings"]
    ]
    branches = report.get("branches")
    if branches and branches["taken"] < GOAL_SHARE * branches["total"]:
        found.append(f"only {branches['taken']} of {branches['total']} branches of the decoders were taken")
    return found + [
        f"planted bug {name} was not found" for name, at in report.get("planted", {}).items() if not at
    ]


def rendered(report: dict[str, Any]) -> str:
    """The report for people; findings go to a file as well."""
    decoders, envelopes = report["decoders"], report["envelopes"]
    lines = [
        f"seed {report['seed']}",
        f"hostile envelopes   {envelopes['count']:>9,}  {envelopes['signed']:,} of them validly signed",
        f"  refused           {sum(envelopes['refused'].values()):>9,}  "
        + " ".join(f"{reason} {count:,}" for reason, count in sorted(envelopes["refused"].items())),
        f"decoder inputs      {decoders['count']:>9,}  {sum(decoders['refused'].values()):,} refused",
    ]
    if "branches" in report:
        branches = report["branches"]
        share = branches["taken"] / branches["total"]
        lines.append(
            f"branches taken      {share:>9.1%}  of {branches['total']}; not: {', '.join(branches['missed']) or '-'}"
        )
    lines += [
        f"planted bug         {at or 'MISSED':>9}  {name}" for name, at in report.get("planted", {}).items()
    ]
    wrong = problems(report)
    if wrong:
        path = Path("build/fuzz") / f"findings-{report['seed']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1), "utf-8")
        lines += [f"PROBLEM: {one}" for one in wrong] + [f"the inputs are in {path}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
