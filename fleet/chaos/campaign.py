"""Many histories on all cores, what came of them, and the first that failed, shrunk.

Laws of the file: a seed's history is the same on any core and in any order; the report is data, with nothing of the
machine in it but the seconds it took. Source: docs/how-to/chaos.md.
"""

from __future__ import annotations

import gc
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
from fleet.chaos.plays import Play, play_of, schedule_of
from fleet.chaos.record import CampaignFile, History, keep_regression
from fleet.chaos.shrink import shrink
from fleet.chaos.template import BEGIN, Template, make_template
from fleet.chaos.violation import Violation
from fleet.chaos.world import Outcome, World
from models.bundle import Bundle
from models.thirds import make_bundle
from process.progress import Progress

DEVICES = 8
_COLLECTED_AFTER = 50_000
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
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    points: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    standings: Counter[str] = field(default_factory=Counter)
    failing: dict[int, str] = field(default_factory=dict)
    shrunk: tuple[Fault, ...] = ()

    def add(self, history: History) -> None:
        """One more history."""
        self.seeds += 1
        self.faults += sum(history.points.values())
        self.updates += history.made
        self.lost += history.lost
        self.doubled += history.doubled
        self.violations += len(history.violations)
        self.rounds += history.rounds
        self.virtual_seconds += history.virtual_seconds
        self.cpu_seconds += history.cpu_seconds
        self.points.update(history.points)
        self.kinds.update(history.kinds)
        self.standings.update(history.standings)
        if history.violations:
            self.failing[history.seed] = history.violations[0]

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
            "cpu_seconds": round(self.cpu_seconds, 1),
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
    template = make_template(bundle, folder, DEVICES, BEGIN)
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
    play: Play | None = None,
) -> Outcome:
    """One history; of the seed's own play unless another is named."""
    return World(template, seed, schedule, play=play, tell=tell).run()


def run_campaign(
    *,
    seeds: int,
    first_seed: int,
    faults: int,
    workers: int = 0,
    state: Path | None = None,
    regressions: Path | None = None,
    tell: Callable[[Line], None] | None = None,
) -> CampaignReport:
    """Plays the seeds; the first that fails is shrunk, and what is left of it played again.

    Args:
        workers: processes; 0 for one a core.
        state: goes on from what this file has, and keeps each history there.
        regressions: takes the shrunk failure.
        tell: takes the trace of the shrunk failure.

    Raises:
        ConfigurationError: (operator) the file is of another campaign.
    """
    report = CampaignReport(first_seed=first_seed, faults_per_seed=faults)
    started, wanted = time.monotonic(), range(first_seed, first_seed + seeds)
    kept = CampaignFile(state, faults)
    for history in kept.of(wanted):
        report.add(history)
    known = {history.seed for history in kept.of(wanted)}
    left = [seed for seed in wanted if seed not in known]
    if left:
        with laboratory() as template, Progress("histories", seeds) as progress:
            progress.advance(len(known), _standing(report))
            for history in _histories(template, left, faults, workers):
                kept.add(history)
                report.add(history)
                progress.advance(1, _standing(report))
            if report.failing:
                _explain(report, template, min(report.failing), regressions, tell)
    report.seconds = time.monotonic() - started
    return report


def _standing(report: CampaignReport) -> str:
    return f"{report.faults} faults, {report.updates} updates, {report.violations} violations"


def _explain(
    report: CampaignReport,
    template: Template,
    seed: int,
    regressions: Path | None,
    tell: Callable[[Line], None] | None,
) -> None:
    """Shrinks a failing seed, keeps what is left, and plays that with a trace."""
    report.shrunk = shrunk_schedule(template, seed, report.faults_per_seed)
    found = play(template, seed, report.shrunk, tell).violations
    if regressions is not None and found:
        what = found[0].what
        name = f"seed {seed}: {_gist(found[0])}"
        keep_regression(regressions, name, what, play_of(seed).name, seed, report.shrunk)


def replay(
    *, seed: int, faults: int, regressions: Path | None = None, tell: Callable[[Line], None] | None = None
) -> CampaignReport:
    """Plays one seed again, and shrinks it if it fails."""
    report = CampaignReport(first_seed=seed, faults_per_seed=faults)
    started = time.monotonic()
    with laboratory() as template:
        report.add(_timed(template, seed, faults, tell))
        if report.failing:
            _explain(report, template, seed, regressions, None)
    report.seconds = time.monotonic() - started
    return report


def _timed(template: Template, seed: int, faults: int, tell: Callable[[Line], None] | None = None) -> History:
    before = time.process_time()
    outcome = play(template, seed, schedule_of(seed, faults), tell)
    return History.of(outcome, round(time.process_time() - before, 3))


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


def _histories(template: Template, seeds: Sequence[int], faults: int, workers: int) -> Iterator[History]:
    count = min(workers or os.cpu_count() or 1, len(seeds))
    if count <= 1:
        with _few_collections():
            for seed in seeds:
                yield _timed(template, seed, faults)
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


def _play_seed(task: tuple[int, int]) -> History:
    seed, faults = task
    if _template is None:
        raise RuntimeError("the worker has no template")
    with _few_collections():
        return _timed(_template, seed, faults)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Half a million objects of libraries are there for good: looking through them costs a tenth of a history."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_COLLECTED_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def render(report: CampaignReport) -> str:
    """For people."""
    lines = [
        f"{report.seeds} histories, {report.faults} faults, {report.updates} updates, {report.rounds} rounds,"
        f" {report.virtual_seconds / 3600:.1f} virtual hours in {report.seconds:.0f} s"
        f" ({report.cpu_seconds:.0f} s of CPU)",
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
