"""Processes struck at single system calls, and disks that lie: a smoke of what `shoal-fleet chaos --real` plays."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from edge_agent.store.storage import DATABASE_NAME
from fleet.real_chaos.damaged_outbox import LOG_NAME, damage, spots
from fleet.real_chaos.device_path import DevicePath
from fleet.real_chaos.foreign_files import Replacement, start_with
from fleet.real_chaos.owing import OwingDevice
from fleet.real_chaos.paths import Workshop, workshop
from fleet.real_chaos.scenario import Task
from fleet.real_chaos.scenarios import SCENARIOS
from fleet.real_chaos.small_disk import can_mount, start_on_full_disk
from fleet.real_chaos.syscalls import paths_of, points, strike_all
from fleet.real_chaos.victim import Nursery, Strike, find_strace
from models.bundle import Bundle

needs_strace = pytest.mark.skipif(find_strace() is None, reason="strace is not installed here")
SMOKE = (
    Strike("pwrite64", 60, "KILL"),
    Strike("rename", 8, "KILL"),
    Strike("pwrite64", 1, "ENOSPC", is_lasting=True),
)


@dataclass(frozen=True)
class Owing:
    """A device that owes six updates, and its folder: killed, with all of them in its log."""

    bench: Workshop
    path: DevicePath
    device: OwingDevice
    folder: Path


@pytest.fixture(scope="module")
def owing(thirds_bundle: Bundle) -> Iterator[Owing]:
    with workshop(thirds_bundle) as bench, Nursery("device") as nursery:
        path = DevicePath(bench, nursery)
        device = OwingDevice(bench, nursery, path)
        folder = bench.root / "owing"
        device.prepare(folder, is_killed=True)
        yield Owing(bench, path, device, folder)


@needs_strace
def test_device_struck_at_a_system_call_loses_and_doubles_nothing_and_serves(owing: Owing) -> None:
    result = strike_all(owing.path, SMOKE, owing.bench.root)
    assert not result.findings.complaints
    assert sum(result.struck.values()) == len(SMOKE), "every point was hit"
    assert result.findings.made >= len(SMOKE)


@pytest.mark.parametrize("bits", [1, 8])
def test_update_in_a_damaged_log_arrives_or_is_told_to_be_destroyed(owing: Owing, bits: int) -> None:
    found = [spot for spot in spots(owing.folder, LOG_NAME) if spot.bits == bits]
    ended = damage(owing.device, owing.folder, found[len(found) // 2], owing.bench.root / "damaged", 1)
    assert not ended.findings.complaints
    assert ended.arrived + ended.told == len(owing.device.owed)


def test_ledger_finds_an_update_that_vanished(owing: Owing) -> None:
    place = owing.bench.root / "vanished"
    shutil.copytree(owing.folder, place)
    (place / LOG_NAME).unlink()
    ended = owing.device.play(place)
    assert ended.findings.lost == len(owing.device.owed)


def test_agent_serves_with_a_folder_in_the_place_of_its_database(owing: Owing) -> None:
    ended = start_with(
        owing.device, owing.folder, Replacement(DATABASE_NAME, "folder"), owing.bench.root / "foreign"
    )
    assert not ended.findings.complaints
    assert ended.quarantined


@pytest.mark.skipif(not can_mount(), reason="only root may mount a disk")
def test_agent_that_starts_on_a_full_disk_serves_and_delivers_later(owing: Owing) -> None:
    found = start_on_full_disk(owing.device, owing.folder, owing.bench.root / "small")
    assert not found.complaints


@needs_strace
@pytest.mark.slow
def test_all_points_of_both_paths_are_counted_and_a_sample_is_struck(thirds_bundle: Bundle) -> None:
    with paths_of(thirds_bundle) as (paths, folder):
        for path in paths:
            every = points(path, folder, ("KILL",))
            assert len(every) > 200
            result = strike_all(path, every[7::40], folder)
            assert not result.findings.complaints
            assert not result.idle


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["damaged_outbox", "foreign_files", "small_disk"])
def test_scenario_finds_nothing(tmp_path: Path, thirds_bundle: Bundle, kind: str) -> None:
    if kind == "small_disk" and not can_mount():
        pytest.skip("only root may mount a disk")
    task = Task(
        folder=tmp_path / "play",
        bundle=thirds_bundle,
        seed=3,
        faults=12,
        broker="embedded",
        until=float("inf"),
    )
    outcome = SCENARIOS[kind].play(task)
    assert not outcome.violations
    assert outcome.faults


def test_spots_cover_every_page_and_every_frame(owing: Owing) -> None:
    database = (owing.folder / DATABASE_NAME).stat().st_size
    assert {spot.start for spot in spots(owing.folder, DATABASE_NAME)} == set(range(0, database, 4096))
    log = sorted({(spot.start, spot.size) for spot in spots(owing.folder, LOG_NAME)})
    assert log[0] == (0, 32)
    assert all(after[0] == before[0] + before[1] for before, after in pairwise(log))
