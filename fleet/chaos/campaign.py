"""Many histories on all cores, what came of them, and the first that failed, shrunk.

Laws of the file: a seed's history is the same on any core and in any order; the report is data, with nothing of the
machine in it but the seconds it took. Source: docs/how-to/chaos.md.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fleet.chaos.faults import POINTS, Fault
from fleet.chaos.injector import Line
from fleet.chaos.ledger import Violation
from fleet.chaos.plays import schedule_of
from fleet.chaos.shrink import shrink
from fleet.chaos.template import Template, make_template
from fleet.chaos.world import Outcome, World
from models.bundle import Bundle
from models.thirds import make_bundle
from process.progress import Progress

DEVICES = 8
INSTALL_SECONDS = 60.0
"""Virtual time in which a device takes its first release up and trusts it."""


@dataclass(slots=True)
class CampaignReport:
    """What came of a campaign.

    Attributes:
        points: how many faults struck at each point.
        failing: seeds whose history ended in a violation, with what it was.
        shrunk: the fewest faults of the first failing seed that still fail.
    """

    first_seed: int
    faults_per_seed: int
    seeds: int = 0
    faults: int = 0
    updates: int = 0
    lost: int = 0
    doubled: int = 0
    violations: int = 0
    rounds: int = 0
    virtual_seconds: float = 0.0
    seconds: float = 0.0
    points: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    standings: Counter[str] = field(default_factory=Counter)
    failing: dict[int, str] = field(default_factory=dict)
    shrunk: tuple[Fault, ...] = ()

    def add(self, outcome: Outcome) -> None:
        """One more history."""
        self.seeds += 1
        self.faults += len(outcome.struck)
        self.updates += outcome.made
        self.lost += outcome.lost
        self.doubled += outcome.doubled
        self.violations += len(outcome.violations)
        self.rounds += outcome.rounds
        self.virtual_seconds += outcome.virtual_seconds
        self.points.update(fault.point for fault in outcome.struck)
        self.kinds.update(fault.kind for fault in outcome.struck)
        self.standings.update(outcome.standings)
        if outcome.violations:
            self.failing[outcome.seed] = str(outcome.violations[0])

    @property
    def never_struck(self) -> list[str]:
        """Points that no fault has reached."""
        return [point for point in POINTS if not self.points[point]]

    def to_json(self) -> str:
        """One object."""
        plain: dict[str, Any] = {
            "seeds": self.seeds,
            "first_seed": self.first_seed,
            "faults_per_seed": self.faults_per_seed,
            "faults": self.faults,
            "updates": self.updates,
            "rounds": self.rounds,
            "lost": self.lost,
            "doubled": self.doubled,
            "violations": self.violations,
            "virtual_seconds": round(self.virtual_seconds, 3),
            "seconds": round(self.seconds, 1),
            "points": {point: self.points[point] for point in POINTS},
            "kinds": dict(sorted(self.kinds.items())),
            "standings": dict(sorted(self.standings.items())),
            "failing": {str(seed): what for seed, what in sorted(self.failing.items())},
            "shrunk": [fault.to_plain() for fault in self.shrunk],
        }
        return json.dumps(plain, indent=2) + "\n"


@contextmanager
def laboratory() -> Iterator[Template]:
    """The template of this process, in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="shoal-chaos-") as name:
        folder = Path(name)
        yield prepare(make_bundle(folder / "bundle"), folder)


def prepare(bundle: Bundle, folder: Path) -> Template:
    """A fleet that has taken up its first release."""
    template = make_template(bundle, folder, DEVICES)
    # One device alone makes no round, and its slots are what each of them would have.
    alone = replace(template, identities=template.identities[:1])
    slots = World(alone, 0, ()).install(INSTALL_SECONDS)
    return replace(
        template, slots=slots, release_sha256=hashlib.sha256(slots["current/release.json"]).hexdigest()
    )


def play(
    template: Template,
    seed: int,
    schedule: Sequence[Fault],
    tell: Callable[[Line], None] | None = None,
) -> Outcome:
    """One history."""
    return World(template, seed, schedule, tell=tell).run()


def run_campaign(*, seeds: int, first_seed: int, faults: int, workers: int = 0) -> CampaignReport:
    """Plays the seeds, on so many cores (0: all of them), and shrinks the first that fails."""
    report = CampaignReport(first_seed=first_seed, faults_per_seed=faults)
    started = time.monotonic()
    with laboratory() as template:
        wanted = range(first_seed, first_seed + seeds)
        with Progress("histories", seeds) as progress:
            for outcome in _outcomes(template, wanted, faults, workers):
                report.add(outcome)
                note = f"{report.faults} faults, {report.violations} violations"
                progress.advance(1, note)
        if report.failing:
            seed = min(report.failing)
            report.shrunk = shrunk_schedule(template, seed, faults)
    report.seconds = time.monotonic() - started
    return report


def replay(*, seed: int, faults: int, tell: Callable[[Line], None] | None = None) -> CampaignReport:
    """Plays one seed again, and shrinks it if it fails."""
    report = CampaignReport(first_seed=seed, faults_per_seed=faults)
    started = time.monotonic()
    with laboratory() as template:
        report.add(play(template, seed, schedule_of(seed, faults), tell))
        if report.failing:
            report.shrunk = shrunk_schedule(template, seed, faults)
    report.seconds = time.monotonic() - started
    return report


def shrunk_schedule(template: Template, seed: int, faults: int) -> tuple[Fault, ...]:
    """The fewest faults of a seed that still fail, and in the same way."""
    first = play(template, seed, schedule_of(seed, faults))
    if not first.violations:
        return ()
    kind = _gist(first.violations[0])

    def fails(part: tuple[Fault, ...]) -> bool:
        found = play(template, seed, part).violations
        return bool(found) and _gist(found[0]) == kind

    return shrink(first.struck, fails)


def _gist(violation: Violation) -> str:
    """What kind of violation it is: its words without names and numbers."""
    return " ".join(word for word in violation.what.split() if word.isalpha())


# ---- on all cores ----------------------------------------------------------------------------------------------

_template: Template | None = None
"""Of a worker process, which makes its own from the bundle that the first one built."""


def _outcomes(template: Template, seeds: range, faults: int, workers: int) -> Iterator[Outcome]:
    count = min(workers or os.cpu_count() or 1, len(seeds))
    if count <= 1:
        for seed in seeds:
            yield play(template, seed, schedule_of(seed, faults))
        return
    # Fresh processes: one that was forked would share the threads and locks of onnxruntime and torch.
    context = multiprocessing.get_context("spawn")
    with context.Pool(count, _begin_worker, (template.bundle.folder,)) as pool:
        yield from pool.imap_unordered(_play_seed, ((seed, faults) for seed in seeds))


def _begin_worker(bundle: Path) -> None:
    global _template
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="shoal-chaos-") as name:
        _template = prepare(Bundle.open(bundle), Path(name))


def _play_seed(task: tuple[int, int]) -> Outcome:
    seed, faults = task
    if _template is None:
        raise RuntimeError("the worker has no template")
    return play(_template, seed, schedule_of(seed, faults))


def render(report: CampaignReport) -> str:
    """For people."""
    lines = [
        f"{report.seeds} histories, {report.faults} faults, {report.updates} updates, {report.rounds} rounds,"
        f" {report.virtual_seconds / 3600:.1f} virtual hours in {report.seconds:.0f} s",
        f"lost {report.lost}   doubled {report.doubled}   violations {report.violations}",
        "",
        f"{'point':<24}faults",
        *(f"{point:<24}{report.points[point]:>6}" for point in POINTS),
    ]
    for seed, what in sorted(report.failing.items())[:1]:
        lines += [
            "",
            f"first failing seed: {seed}: {what}",
            f"replay it: shoal-fleet chaos --seed {seed} --faults {report.faults_per_seed} --trace",
            "the fewest faults that do it:",
            *(f"  {json.dumps(fault.to_plain())}" for fault in report.shrunk),
        ]
    return "\n".join(lines) + "\n"
