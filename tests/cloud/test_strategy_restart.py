"""What strategies carry from round to round survives a kill between any two commits: the database is opened anew, and
the parameters are those of a run that nobody disturbed, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cloud_server.db import schema
from cloud_server.db.engine import open_database
from tests.cloud.round_lab import BlownFuseError, FusedDatabase, Lab

ROUNDS = 3
STRATEGIES: dict[str, Mapping[str, Any]] = {
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "FedAdam": {},
    "FedYogi": {},
    "FedAdagrad": {},
    "ClippedMean": {},
    "DifferentialPrivacyServerSideAdaptiveClipping": {
        "strategy": {"name": "FedAvgM", "parameters": {"server_momentum": 0.5}},
        "noise_multiplier": 0.1,
        "num_sampled_clients": 4,
    },
    "DifferentialPrivacyClientSideAdaptiveClipping": {
        "strategy": {"name": "FedAvg", "parameters": {}},
        "noise_multiplier": 0.1,
        "num_sampled_clients": 4,
    },
}


class FileLab(Lab):
    """The lab on a database in a file, which each process opens for itself."""

    def __init__(self, folder: Path, strategy: str) -> None:
        self._url = f"sqlite:///{folder / 'cloud.db'}"
        super().__init__(
            4,
            strategy=strategy,
            parameters=STRATEGIES[strategy],
            database=self._url,
            rounds=ROUNDS,
            quorum=4,
            evaluate_every=0,
        )

    def reopen(self) -> None:
        """The process ended here; another one comes."""
        self.database.close()
        self.database = FusedDatabase(open_database(self._url)._engine)
        self.database.fuse = self.fuse
        self.restart()

    def commits(self) -> int:
        return self.fuse.steps.count("after commit")


def play(lab: FileLab, *, kill_at: int) -> bool:
    """Runs to the end, with a kill at one step (-1: none); says whether it was reached."""
    lab.fuse.steps.clear()
    lab.fuse.at = kill_at
    is_killed = False
    for _ in range(400):
        if lab.runner.is_finished:
            return is_killed
        try:
            lab.step()
        except BlownFuseError:
            is_killed = True
            lab.reopen()
    raise AssertionError(f"not finished: {lab.runner.view()}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_killed_at_each_commit_of_a_round_gives_the_same_parameters(
    strategy: str, tmp_path: Path
) -> None:
    whole = FileLab(_folder(tmp_path, "whole"), strategy)
    play(whole, kill_at=-1)
    expected, steps = whole.runner.head.sha256, list(whole.fuse.steps)
    states = {row.name for row in whole.rows(schema.strategy_state)}
    assert states, "this strategy has no state: the test would prove nothing"
    commits = [at for at, what in enumerate(steps) if what in ("before commit", "after commit")]
    # The second of three rounds: there is a state that it must begin with, and one that the next begins with.
    share = len(commits) // ROUNDS
    for at in commits[share : 2 * share + 2]:
        lab = FileLab(_folder(tmp_path, str(at)), strategy)
        assert play(lab, kill_at=at), f"step {at} ({steps[at]}) was not reached"
        assert lab.runner.head.sha256 == expected, f"killed at step {at} ({steps[at]})"
        lab.database.close()
    whole.database.close()


def test_state_that_is_lost_would_be_seen(tmp_path: Path) -> None:
    """The test above can fail: without what the strategy carried, the parameters are others."""
    whole = FileLab(_folder(tmp_path, "whole"), "FedAvgM")
    play(whole, kill_at=-1)
    lab = FileLab(_folder(tmp_path, "robbed"), "FedAvgM")
    lab.fuse.steps.clear()
    while not any(row.round == 1 for row in lab.rows(schema.strategy_state)):
        lab.step()
    with lab.database.transaction() as connection:
        connection.execute(schema.strategy_state.delete())
    lab.reopen()
    assert lab.run().sha256 != whole.runner.head.sha256


def _folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    return folder
