"""Ten thousand trials on a few cores: numbered, counted line by line in a file, so that a run goes on where it ended.

Law of the file: a trial follows from the seed of the run and its number alone; what is in the file is not tried again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random

from process.progress import Progress
from tests.fuzz.models.mutations import mutant
from tests.fuzz.models.seeds import Seed, seeds_by_hand, seeds_of_zoo
from tests.fuzz.models.trials import AGENT_DIED, BEFORE_RUNTIME, Outcome, try_model

BATCH = 20


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial and what it began with."""

    number: int
    seed: str
    change: str
    word: str
    reason: str
    served: int
    agent_bytes: int

    @property
    def is_death(self) -> bool:
        return self.word == AGENT_DIED

    @property
    def reached_runtime(self) -> bool:
        return self.word != BEFORE_RUNTIME


def trial(run: int, number: int, seeds: Sequence[Seed]) -> Trial:
    """The trial of a number."""
    seed, change, data = mutant(Random(f"{run} {number}"), seeds)
    outcome: Outcome = try_model(seed, data, number)
    return Trial(number, seed.name, change, outcome.word, outcome.reason, outcome.served, outcome.agent_bytes)


_seeds: tuple[Seed, ...] = ()


def _begin(zoo: Path | None) -> None:
    global _seeds
    _seeds = all_seeds(zoo)


def all_seeds(zoo: Path | None) -> tuple[Seed, ...]:
    """Those made by hand, and the zoo's from a folder, if it is given."""
    return (*seeds_by_hand(), *(seeds_of_zoo(zoo) if zoo is not None else ()))


def _batch(run: int, numbers: Sequence[int]) -> list[Trial]:
    return [trial(run, number, _seeds) for number in numbers]


def known(path: Path) -> list[Trial]:
    """The trials of a file; a line that the end of an earlier run cut short is left out."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(Trial(**json.loads(line)))
            except (ValueError, TypeError):
                continue
    return found


def run(path: Path, *, seed: int, count: int, workers: int, zoo: Path | None) -> list[Trial]:
    """Tries mutants until so many have reached the runtime; each is in the file as soon as its batch is done.

    Args:
        path: where trials are kept; those that are there count.
        zoo: folder of the zoo's seeds; None leaves them out.
    """
    done = known(path)
    all_seeds(zoo)
    path.parent.mkdir(parents=True, exist_ok=True)
    reached = sum(each.reached_runtime for each in done)
    numbers = _numbers({each.number for each in done})
    # Fork, not spawn, of a process that has never opened a session: each trial forks again.
    with (
        Progress("models", count) as progress,
        path.open("a", encoding="utf-8") as lines,
        ProcessPoolExecutor(workers, get_context("spawn"), _begin, (zoo,)) as pool,
    ):
        progress.advance(reached)
        while reached < count:
            wanted = min(workers, max(1, (count - reached) // BATCH))
            waiting = [
                pool.submit(_batch, seed, [next(numbers) for _ in range(BATCH)]) for _ in range(4 * wanted)
            ]
            for future in waiting:
                for each in future.result():
                    lines.write(json.dumps(asdict(each)) + "\n")
                    done.append(each)
                    reached += each.reached_runtime
                    progress.advance(each.reached_runtime)
                lines.flush()
    return done


def _numbers(taken: set[int]) -> Iterator[int]:
    number = 0
    while True:
        if number not in taken:
            yield number
        number += 1


def table(trials: Sequence[Trial]) -> str:
    """How many ended how, as Markdown."""
    words = Counter(each.word for each in trials)
    rows = [f"| {word} | {number:,} |" for word, number in words.most_common()]
    reached = sum(each.reached_runtime for each in trials)
    answered = sum(each.served for each in trials)
    head = f"{reached:,} mutants reached the runtime, {len(trials) - reached:,} did not; {answered:,} inputs answered"
    return "\n".join((head, "", "| outcome | mutants |", "|---|---|", *rows))
