"""A campaign of real faults: play after play until each kind has had its share, one table, one file to go on from.

Laws of the file: a play is whole or none: what is in the file ended, with its books closed, and the next start goes on
behind it; the folder of a play that found something is kept, any other goes; the table counts nothing that the plays
did not. Source: docs/how-to/chaos.md.
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec

from edge_agent.store.disk import write_durably
from fleet.real_chaos.outcome import Outcome
from fleet.real_chaos.report import FORMAT, CampaignFile, CampaignPlan, Play, RealReport
from fleet.real_chaos.scenario import Scenario, Task
from fleet.real_chaos.scenarios import SCENARIOS
from models.bundle import Bundle
from models.thirds import make_bundle
from process.progress import Progress
from wire.errors import ConfigurationError, StorageError

FILE_NAME: Final = "campaign.json"
PLAY_FAULTS: Final = 24
"""Faults of one fleet, at most: what is lost when a campaign is stopped in the middle of a play."""


def check_kinds(names: Sequence[str]) -> tuple[str, ...]:
    """The scenarios of these names, all of them for none.

    Raises:
        ConfigurationError: (operator) there is no such scenario, or this machine lacks a program for it.
    """
    for name in names:
        scenario = SCENARIOS.get(name)
        if scenario is None:
            raise ConfigurationError(
                f"there is no kind of fault {name!r}", hint=f"there are {', '.join(SCENARIOS)}"
            )
        if lacking := _lacking(scenario):
            raise ConfigurationError(
                f"{name} needs {lacking}, which is not on PATH",
                hint=f"install it (Debian: apt install {lacking})",
            )
    return tuple(dict.fromkeys(names)) or tuple(SCENARIOS)


def run_real_campaign(plan: CampaignPlan, out: Path | None) -> RealReport:
    """Plays until the plan is done or its time is up; goes on from what `out` has.

    Args:
        out: keeps the campaign's file and the folders of plays that found something; None for nowhere.

    Raises:
        ConfigurationError: (operator) what lies in `out` is of another campaign, or none.
        StorageError: (disk) it cannot be written.
        BrokerError: the broker is not there.
    """
    skipped = {name: lacking for name in plan.kinds if (lacking := _lacking(SCENARIOS[name]))}
    for name, lacking in skipped.items():
        print(f"{name} is left out: {lacking} is not on PATH", file=sys.stderr)
    with ExitStack() as stack:
        stack.enter_context(_terminable())
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-chaos-")))
        kept = _Kept(plan, out)
        bundle: Bundle | None = None
        wanted = _shares(plan, [name for name in plan.kinds if name not in skipped])
        progress = stack.enter_context(Progress("faults", sum(wanted.values())))
        progress.advance(min(kept.total(), sum(wanted.values())))
        until = time.monotonic() + plan.seconds
        fruitless: set[str] = set()
        while time.monotonic() < until and (kind := _next_kind(wanted, kept, fruitless)):
            bundle = bundle or make_bundle(scratch / "bundle")
            base = progress.done
            task = Task(
                folder=(out or scratch) / f"play-{kept.next_number}",
                bundle=bundle,
                seed=plan.seed + kept.next_number,
                faults=min(PLAY_FAULTS, wanted[kind] - kept.count(kind)),
                broker=plan.brokers[kept.next_number % len(plan.brokers)],
                until=until,
                tell=lambda count, base=base: progress.advance(base + count - progress.done),  # type: ignore[misc]
            )
            shutil.rmtree(task.folder, ignore_errors=True)
            outcome = SCENARIOS[kind].play(task)
            kept.add(outcome)
            if not outcome.faults:
                fruitless.add(kind)
            if not outcome.violations or out is None:
                shutil.rmtree(task.folder, ignore_errors=True)
            progress.advance(base + outcome.faults - progress.done, kind)
        return RealReport(plan, kept.file.plays, skipped)


class _Kept:
    """The file of a campaign."""

    def __init__(self, plan: CampaignPlan, out: Path | None) -> None:
        self._path = None if out is None else out / FILE_NAME
        self.file = CampaignFile(seed=plan.seed, brokers=list(plan.brokers), kinds=list(plan.kinds))
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{out} cannot be made: {error.strerror}", hint="name a folder with --out"
            ) from error
        if self._path.exists():
            self._read(self._path)
        else:
            self._write()

    @property
    def next_number(self) -> int:
        """Of the next play."""
        return len(self.file.plays)

    def total(self) -> int:
        """Faults that have counted so far."""
        return sum(play.faults for play in self.file.plays)

    def count(self, kind: str) -> int:
        """Of one kind."""
        return sum(play.faults for play in self.file.plays if play.kind == kind)

    def add(self, outcome: Outcome) -> None:
        """One more play, on the disk when it returns; one that hit nothing and found nothing is none."""
        if not outcome.faults and not outcome.violations:
            return
        self.file.plays.append(msgspec.convert(outcome.to_plain(), Play))
        self._write()

    def _read(self, path: Path) -> None:
        new = "name another folder with --out, or move this one away to begin anew"
        try:
            found = msgspec.json.decode(path.read_bytes(), type=CampaignFile)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigurationError(f"{path} is not a campaign of ours: {error}", hint=new) from error
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error
        asked = (self.file.seed, self.file.brokers, self.file.kinds)
        if found.format != FORMAT or (found.seed, found.brokers, found.kinds) != asked:
            raise ConfigurationError(f"{path} is of a campaign with another seed, broker or kinds", hint=new)
        self.file = found

    def _write(self) -> None:
        if self._path is not None:
            encoded = msgspec.json.format(msgspec.json.encode(self.file), indent=1)
            write_durably(self._path, encoded, mode=0o644)


def _shares(plan: CampaignPlan, kinds: Sequence[str]) -> dict[str, int]:
    """How many faults each kind shall have."""
    weights = sum(SCENARIOS[kind].weight for kind in kinds)
    return {kind: math.ceil(plan.faults * SCENARIOS[kind].weight / weights) for kind in kinds}


def _next_kind(wanted: Mapping[str, int], kept: _Kept, fruitless: set[str]) -> str:
    """The kind that is furthest behind its share; empty when none is.

    Args:
        fruitless: kinds whose last play hit nothing: another would not, either.
    """
    behind = {
        kind: kept.count(kind) / share
        for kind, share in wanted.items()
        if kept.count(kind) < share and kind not in fruitless
    }
    return min(behind, key=behind.__getitem__, default="")


def _lacking(scenario: Scenario) -> str:
    """The first program that a scenario needs and this machine does not have."""
    return next((name for name in scenario.needs if shutil.which(name) is None), "")


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a campaign as Ctrl-C does: with nothing left running."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
