"""A few mutated models on their way through a device, in processes of their own: `python -m tests.fuzz.models` runs ten
thousand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

from tests.fuzz.models.campaign import Trial, known, table
from tests.fuzz.models.mutations import mutant
from tests.fuzz.models.seeds import seeds_by_hand

_DYING = """
import os, signal
from tests.fuzz.models.trials import watched
def killed(tell): os.kill(os.getpid(), signal.SIGSEGV)
def raised(tell): raise RuntimeError("nobody expected this")
def lived(tell): tell({"word": "served", "served": 3})
print([watched(life).word for life in (killed, raised, lived)])
"""


def test_no_agent_dies_of_a_mutated_model(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.models",
        "--count",
        "16",
        "--by-hand",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = known(tmp_path / "models-1-by-hand.jsonl")
    assert sum(each.reached_runtime for each in trials) >= 16
    assert {"refused by the runtime", "served"} <= {each.word for each in trials}
    assert all(each.served == 1000 for each in trials if each.word == "served")


def test_agent_that_dies_is_told_apart_from_one_that_lives() -> None:
    done = subprocess.run([sys.executable, "-c", _DYING], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "['agent died', 'agent died', 'served']"


def test_same_number_gives_the_same_mutant_and_others_differ() -> None:
    seeds = seeds_by_hand()
    first, again = ([mutant(Random(f"1 {n}"), seeds)[2] for n in range(20)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 15


def test_run_goes_on_behind_a_line_that_was_cut_short(tmp_path: Path) -> None:
    trial = Trial(3, "dense", "drop", "agent died", "exit -11", 0, 0)
    path = tmp_path / "models.jsonl"
    path.write_text(
        '{"number": 3, "seed": "dense", "change": "drop", "word": "agent died", "reason": "exit -11",'
        ' "served": 0, "agent_bytes": 0}\n{"number": 4, "se',
        encoding="utf-8",
    )
    assert known(path) == [trial]
    assert trial.is_death
    assert "| agent died | 1 |" in table([trial])
