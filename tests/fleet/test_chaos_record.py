"""A campaign that was cut off goes on from its file, and a failure is kept once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.chaos.campaign import run_campaign
from fleet.chaos.plays import schedule_of
from fleet.chaos.record import CampaignFile, History, keep_regression
from wire.errors import ConfigurationError

FAULTS = 3
SOUND = History(
    seed=0,
    made=31,
    points={"up.up": 2, "broker": 1},
    kinds={"lose": 2, "amnesia": 1},
    standings={"folded": 31},
    violations=(),
    lost=0,
    doubled=0,
    rounds=5,
    virtual_seconds=90.0,
    cpu_seconds=1.5,
)


def test_campaign_whose_histories_are_all_kept_plays_none_and_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "campaign.json"
    kept = CampaignFile(path, FAULTS)
    for seed in range(4):
        kept.add(replace(SOUND, seed=seed))
    report = run_campaign(seeds=3, first_seed=1, faults=FAULTS, state=path)
    assert (report.seeds, report.faults, report.updates, report.violations) == (3, 9, 93, 0)
    assert report.points == {"up.up": 6, "broker": 3}
    assert report.cpu_seconds == 4.5


def test_history_that_failed_is_played_again(tmp_path: Path) -> None:
    path = tmp_path / "campaign.json"
    kept = CampaignFile(path, FAULTS)
    kept.add(SOUND)
    kept.add(replace(SOUND, seed=1, violations=("1.0 s, cloud: lost",), lost=1))
    assert [each.seed for each in CampaignFile(path, FAULTS).of(range(2))] == [0]


@pytest.mark.parametrize(
    "content", ['{"format": 1}', "no json", '{"format": 1, "faults": 4, "histories": []}']
)
def test_file_of_another_campaign_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "campaign.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=r"campaign\.json is "):
        CampaignFile(path, FAULTS)


def test_failure_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "regressions.json"
    faults = schedule_of(3, 2)
    for _ in range(2):
        keep_regression(path, "a name", "what it was", "averaged", 3, faults)
    keep_regression(path, "another", "what it was", "masked", 4, faults)
    kept = json.loads(path.read_text())
    told = [(each["name"], each["play"], each["seed"]) for each in kept]
    assert told == [("a name", "averaged", 3), ("another", "masked", 4)]
    assert kept[0]["faults"] == [fault.to_plain() for fault in faults]
