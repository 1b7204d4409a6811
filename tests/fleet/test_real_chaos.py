"""Real processes under real faults: a smoke of it, what its ledger finds, and its campaigns' files and errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest

from cloud_server.artefacts import Artefacts
from fleet.cli import main
from fleet.real_chaos import killing
from fleet.real_chaos.campaign import FILE_NAME, run_real_campaign
from fleet.real_chaos.ledger import DeviceFiles, Ledger
from fleet.real_chaos.outcome import Books, Outcome
from fleet.real_chaos.real_fleet import RealFleet
from fleet.real_chaos.report import CampaignPlan, render_real
from fleet.real_chaos.scenario import Task
from fleet.real_chaos.scenarios import SCENARIOS
from fleet.real_chaos.waves import CALM_ROUNDS, Fault, play_waves
from models.bundle import Bundle
from tests.fleet.waiting import LIMIT_SECONDS, wait_for
from wire.errors import ConfigurationError
from wire.transport.broker import find_mosquitto

FAULTS = 3


@dataclass(frozen=True)
class Played:
    """A fleet that was broken and has ended."""

    outcome: Outcome
    folder: Path


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, thirds_bundle: Bundle) -> Played:
    """An agent and the embedded broker killed, the aggregator stopped; `test_restart.py` kills that."""
    folder = tmp_path_factory.mktemp("real") / "fleet"
    task = Task(
        folder=folder,
        bundle=thirds_bundle,
        seed=5,
        faults=FAULTS,
        broker="embedded",
        until=float("inf"),
        devices=2,
    )
    return Played(play_waves("smoke", task, _faults, RealFleet(task)), folder)


def _faults(fleet: RealFleet) -> Sequence[Fault]:
    agent, *_ = killing.agent_kills(fleet)
    return [agent, *killing.broker_kills(fleet), *killing.cloud_stops(fleet)]


def test_killed_and_stopped_in_the_middle_of_work_nobody_loses_or_doubles_anything(played: Played) -> None:
    outcome = played.outcome
    assert outcome.violations == ()
    assert outcome.faults >= FAULTS
    assert outcome.rounds >= CALM_ROUNDS
    assert outcome.refusals == 0
    books = outcome.books
    assert (books.lost, books.doubled, books.altered, books.owed) == (0, 0, 0, 0)
    assert books.updates >= books.places["folded"] >= 2


@pytest.mark.slow
@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not on this machine")
def test_everything_at_once_under_mutual_tls_loses_and_doubles_nothing(
    tmp_path: Path, thirds_bundle: Bundle
) -> None:
    task = Task(
        folder=tmp_path / "fleet",
        bundle=thirds_bundle,
        seed=3,
        faults=6,
        broker="mosquitto",
        until=float("inf"),
        devices=2,
    )
    outcome = SCENARIOS["mixed"].play(task)
    assert outcome.violations == ()
    assert outcome.faults >= 1
    assert outcome.rounds >= CALM_ROUNDS


# ---- the ledger finds what is planted ------------------------------------------------------------------------------


def books_of(folder: Path) -> Books:
    devices = {
        path.stem: DeviceFiles(path.with_suffix("") / "agent.db", path) for path in folder.glob("*.witness")
    }
    blobs = Artefacts.in_folder(folder / "cloud" / "artefacts")
    return Ledger(folder / "cloud" / "cloud.db", devices, blobs.get_blob).reconcile()


def in_cloud(sql: str, folder: Path) -> None:
    with closing(sqlite3.connect(folder / "cloud" / "cloud.db")) as connection, connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        assert connection.execute(sql).rowcount == 1


def without_a_note(folder: Path) -> None:
    path = next(path for path in folder.glob("*.witness") if '"made"' in path.read_text())
    made = next(line for line in path.read_text().splitlines() if '"made"' in line)
    path.write_text(path.read_text().replace(made, ""))


_FOLDED = "(SELECT update_id FROM updates WHERE state = 'folded' AND kind = 'train' LIMIT 1)"


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (partial(in_cloud, f"DELETE FROM updates WHERE update_id = {_FOLDED}"), "lost"),
        (partial(in_cloud, f"UPDATE updates SET state = 'late' WHERE update_id = {_FOLDED}"), "lost"),
        (partial(in_cloud, f"UPDATE updates SET state = 'discarded' WHERE update_id = {_FOLDED}"), "doubled"),
        (
            partial(
                in_cloud,
                f"UPDATE updates SET body_sha256 = '{'0' * 64}' WHERE update_id = {_FOLDED}",
            ),
            "altered",
        ),
        (
            partial(
                in_cloud,
                "UPDATE updates SET order_id = (SELECT order_id FROM updates WHERE state = 'folded'"
                f" AND update_id != {_FOLDED} LIMIT 1) WHERE update_id = {_FOLDED}",
            ),
            "doubled",
        ),
        (without_a_note, "altered"),
    ],
    ids=["gone", "late", "not folded", "other content", "second answer", "made by nobody"],
)
def test_ledger_finds_what_is_planted(
    played: Played, tmp_path: Path, plant: Callable[[Path], None], what: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(played.folder, folder)
    assert books_of(folder).complaints == ()
    plant(folder)
    found = books_of(folder)
    assert getattr(found, what) >= 1, found
    assert found.complaints


# ---- campaigns -----------------------------------------------------------------------------------------------------

PLAN = CampaignPlan(faults=4, seconds=3600.0, seed=7, kinds=("agent_kill",), brokers=("embedded",))


def campaign_file(folder: Path, played: Played, *, faults: int) -> Path:
    """Of a campaign that has come so far."""
    play = replace(played.outcome, kind="agent_kill", faults=faults).to_plain()
    path = folder / FILE_NAME
    path.write_text(
        json.dumps(
            {"format": 1, "seed": 7, "brokers": ["embedded"], "kinds": ["agent_kill"], "plays": [play]}
        )
    )
    return path


def test_campaign_that_is_done_plays_no_more_and_gives_its_table(tmp_path: Path, played: Played) -> None:
    path = campaign_file(tmp_path, played, faults=4)
    before = path.read_bytes()
    report = run_real_campaign(PLAN, tmp_path)
    assert path.read_bytes() == before
    plain = json.loads(report.to_json())
    assert (plain["faults"], plain["lost"], plain["doubled"], plain["violations"]) == (4, 0, 0, 0)
    assert plain["updates"] == played.outcome.books.updates
    assert plain["kinds"]["agent_kill"]["faults"] == 4
    head, row, total = render_real(report).splitlines()
    assert head.split()[:2] == ["kind", "faults"]
    assert row.split()[:2] == ["agent_kill", "4"]
    assert total.split()[:2] == ["all", "4"]


@pytest.mark.parametrize("what", ["no JSON", "another seed"])
def test_campaign_does_not_go_on_from_what_is_not_its_own(tmp_path: Path, played: Played, what: str) -> None:
    path = campaign_file(tmp_path, played, faults=1)
    if what == "no JSON":
        path.write_text("{")
    plan = replace(PLAN, seed=8) if what == "another seed" else PLAN
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="campaign"):
        run_real_campaign(plan, tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        "--real --seeds 3",
        "--real --trace",
        "--kinds agent_kill",
        "--seconds 5",
        "--real --kinds nothing",
        "--real --kinds agent_kill,,late",
        "--real --faults -1",
        "--real --seconds 0",
        "--real --broker rabbit",
    ],
)
def test_wrong_options_are_one_error_with_a_hint(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")


def processes_that_name(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_campaign_that_is_interrupted_leaves_no_process_behind(tmp_path: Path, number: int) -> None:
    out = tmp_path / "campaign"
    program = "import sys; from fleet.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "chaos", "--real", "--faults", "50", "--broker", "embedded"]
    with subprocess.Popen(
        [*command, "--kinds", "agent_stop", "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        wait_for(lambda: len(processes_that_name(f"{out}/play-0/device-")) >= 3, "three agents")
        process.send_signal(number)
        _, errors = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 130, errors.decode()
    until = time.monotonic() + LIMIT_SECONDS
    while (left := processes_that_name(f"{out}/play-0/")) and time.monotonic() < until:
        time.sleep(0.05)
    assert left == []
