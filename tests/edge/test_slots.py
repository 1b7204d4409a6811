"""How a release becomes current, and that one can always serve: damage, crashes, old and failed releases."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.release.files import INT8, Standing
from edge_agent.release.memory_slots import MemorySlots, SharedReleases
from edge_agent.release.slots import Slots, SlotStore
from tests.edge.tiny_release import graph_files, tiny_release
from wire.errors import BundleError, ReleaseError, StorageError
from wire.manifest import (
    CHECKPOINT,
    FLOAT32,
    GOLDEN_INPUTS,
    GOLDEN_OUTPUTS,
    GRAPH_FILES,
    MANIFEST,
    RELEASE,
    TEMPLATE,
    TRAIN_SGD,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["disk", "memory"])
def slots(request: pytest.FixtureRequest, tmp_path: Path) -> SlotStore:
    return Slots(tmp_path) if request.param == "disk" else MemorySlots(SharedReleases())


def install(slots: SlotStore, version: int, *, rollback: bool = False, serial: int | None = None) -> None:
    files = tiny_release(version)[1]
    slots.promote(slots.stage(files, serial=version if serial is None else serial, rollback=rollback))
    slots.confirm()


def version_of(slots: SlotStore) -> int:
    contents = slots.current()
    return contents.version if contents is not None else 0


def test_fresh_device_has_no_release(slots: SlotStore) -> None:
    assert slots.current() is None
    assert slots.roll_back() is None


def test_promoted_release_is_current_and_on_probation(slots: SlotStore) -> None:
    release, files = tiny_release(1)
    promoted = slots.promote(slots.stage(files, serial=4))
    current = slots.current()
    assert current is not None
    assert current.release == promoted.release == release
    assert slots.on_probation
    assert (slots.standing.floor_version, slots.standing.serial) == (1, 4)
    slots.confirm()
    assert not slots.on_probation


def test_contents_give_every_file_by_its_hash(slots: SlotStore) -> None:
    install(slots, 1)
    contents = slots.current()
    assert contents is not None
    _, files = tiny_release(1)
    for name in (*GRAPH_FILES, CHECKPOINT, GOLDEN_INPUTS, GOLDEN_OUTPUTS):
        assert contents.read(name) == files[name]
    assert contents.int8() == contents.rebuild_int8()
    assert contents.int8() != files[TEMPLATE]
    assert contents.float32() != files[FLOAT32]
    with pytest.raises(BundleError):
        contents.read("CARD.md")


def test_next_release_needs_no_graph_files(slots: SlotStore) -> None:
    install(slots, 1)
    manifest, graphs = graph_files()
    assert slots.held(manifest.graphs_sha256) == {*GRAPH_FILES, MANIFEST}
    files = {name: data for name, data in tiny_release(2)[1].items() if name not in GRAPH_FILES}
    slots.promote(slots.stage(files, serial=2))
    contents = slots.current()
    assert contents is not None
    assert contents.version == 2
    assert contents.read(TRAIN_SGD) == graphs[TRAIN_SGD]


def test_nothing_is_held_of_an_unknown_model(slots: SlotStore) -> None:
    assert slots.held("ab" * 32) == frozenset()


@pytest.mark.parametrize("name", [RELEASE, MANIFEST, CHECKPOINT, GOLDEN_INPUTS, GOLDEN_OUTPUTS, *GRAPH_FILES])
@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_stage_refuses_files_that_were_not_signed_for(slots: SlotStore, name: str, damage: str) -> None:
    install(slots, 1, serial=0)
    files = dict(tiny_release(2, model="other")[1])
    data = files.pop(name)
    if damage == "flipped":
        files[name] = data[:-1] + bytes([data[-1] ^ 1])
    elif damage == "cut":
        files[name] = data[: len(data) // 2]
    with pytest.raises(BundleError):
        slots.stage(files, serial=2)
    assert version_of(slots) == 1


def test_stage_takes_paths(slots: SlotStore, tmp_path: Path) -> None:
    files = {}
    for name, data in tiny_release(1)[1].items():
        files[name] = tmp_path / f"download-{name}"
        files[name].write_bytes(data)
    slots.promote(slots.stage(files))
    assert version_of(slots) == 1


def test_older_release_is_refused_without_a_signed_rollback(slots: SlotStore) -> None:
    install(slots, 2)
    with pytest.raises(ReleaseError, match="older than 2"):
        slots.stage(tiny_release(1)[1], serial=3)
    install(slots, 1, rollback=True, serial=4)
    assert version_of(slots) == 1
    with pytest.raises(ReleaseError, match="ring file is older"):
        slots.stage(tiny_release(3)[1], serial=3)
    install(slots, 3, serial=5)
    assert version_of(slots) == 3


def test_roll_back_returns_to_the_last_good_release(slots: SlotStore) -> None:
    install(slots, 1)
    slots.promote(slots.stage(tiny_release(2)[1], serial=2))
    back = slots.roll_back()
    assert back is not None
    assert back.version == version_of(slots) == 1
    assert not slots.on_probation
    assert slots.standing.floor_version == 2


def test_release_that_failed_here_is_not_staged_again(slots: SlotStore) -> None:
    install(slots, 1)
    slots.promote(slots.stage(tiny_release(2)[1], serial=2))
    slots.roll_back()
    with pytest.raises(ReleaseError, match="failed on this device"):
        slots.stage(tiny_release(2)[1], serial=2)
    install(slots, 3)
    assert version_of(slots) == 3


def test_roll_back_twice_ends_at_the_factory_release(slots: SlotStore) -> None:
    for version in (1, 2, 3):
        install(slots, version)
    assert [found.version for found in (slots.roll_back(), slots.roll_back()) if found] == [2, 1]
    last = slots.roll_back()
    assert last is not None
    assert last.version == 1


def test_first_release_is_kept_when_there_is_nothing_to_go_back_to(slots: SlotStore) -> None:
    slots.promote(slots.stage(tiny_release(1)[1]))
    kept = slots.roll_back()
    assert kept is not None
    assert kept.version == 1
    assert not slots.on_probation


def test_same_release_again_keeps_the_last_good_one(slots: SlotStore) -> None:
    install(slots, 1)
    install(slots, 2)
    install(slots, 2)
    back = slots.roll_back()
    assert back is not None
    assert back.version == 1


def test_promote_takes_only_what_is_staged(slots: SlotStore) -> None:
    staged = slots.stage(tiny_release(1)[1])
    slots.stage(tiny_release(2)[1], serial=2)
    with pytest.raises(StorageError):
        slots.promote(staged)
    assert slots.current() is None


def test_contents_survive_the_swaps_after_them(slots: SlotStore) -> None:
    install(slots, 1)
    before = slots.current()
    assert before is not None
    install(slots, 2)
    assert before.read(CHECKPOINT) == tiny_release(1)[1][CHECKPOINT]
    assert before.int8() == before.rebuild_int8()


def test_fleet_in_one_process_shares_its_releases() -> None:
    shared = SharedReleases()
    one, two = MemorySlots(shared), MemorySlots(shared)
    install(one, 1)
    install(two, 1)
    assert one.current() is two.current()


# --- disk
# ---------------------------------------------------------------------------------------------------------


def test_slots_are_found_again_after_a_restart(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    install(slots, 1)
    slots.promote(slots.stage(tiny_release(2)[1], serial=2))
    again = Slots(tmp_path)
    assert version_of(again) == 2
    assert again.on_probation
    assert again.standing == slots.standing
    back = again.roll_back()
    assert back is not None
    assert back.version == 1


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [RELEASE, MANIFEST])
def test_damaged_slot_is_quarantined_and_the_last_good_one_serves(tmp_path: Path, name: str) -> None:
    slots = Slots(tmp_path)
    install(slots, 1)
    install(slots, 2)
    damage(tmp_path / "slots" / "current" / name)
    again = Slots(tmp_path)
    assert version_of(again) == 1
    reasons = list((tmp_path / "quarantine").glob("*current*.reason"))
    assert len(reasons) == 1
    assert version_of(Slots(tmp_path)) == 1


def test_damaged_int8_file_is_built_again(tmp_path: Path) -> None:
    install(Slots(tmp_path), 1)
    good = (tmp_path / "slots" / "current" / INT8).read_bytes()
    damage(tmp_path / "slots" / "current" / INT8)
    slots = Slots(tmp_path)
    contents = slots.current()
    assert contents is not None
    assert contents.int8() == good
    assert (tmp_path / "slots" / "current" / INT8).read_bytes() == good


def test_damaged_graphs_do_not_stop_inference_and_are_fetched_again(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    install(slots, 1)
    manifest, _ = graph_files()
    for name in (TEMPLATE, TRAIN_SGD):
        damage(tmp_path / "slots" / "graphs" / manifest.graphs_sha256 / name)
    contents = slots.current()
    assert contents is not None
    assert contents.int8()
    with pytest.raises(BundleError):
        contents.read(TRAIN_SGD)
    assert slots.held(manifest.graphs_sha256) == {*GRAPH_FILES, MANIFEST} - {TEMPLATE, TRAIN_SGD}
    install(slots, 2)
    assert slots.held(manifest.graphs_sha256) == {*GRAPH_FILES, MANIFEST}


def test_every_slot_damaged_gives_none_and_never_raises(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    install(slots, 1)
    install(slots, 2)
    for slot in ("current", "last_good", "factory"):
        damage(tmp_path / "slots" / slot / RELEASE)
    assert slots.current() is None
    install(slots, 3)
    assert version_of(slots) == 3


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"probation":"x"}', b'{"floor_version":-1}'])
def test_damaged_state_keeps_the_version_floor(tmp_path: Path, content: bytes) -> None:
    install(Slots(tmp_path), 2)
    (tmp_path / "slots" / "STATE.json").write_bytes(content)
    slots = Slots(tmp_path)
    assert version_of(slots) == 2
    with pytest.raises(ReleaseError):
        slots.stage(tiny_release(1)[1])


def test_graphs_that_no_slot_needs_are_dropped(tmp_path: Path) -> None:
    slots = Slots(tmp_path)
    for version, model in ((1, "tiny"), (2, "b"), (3, "c"), (4, "c")):
        slots.promote(slots.stage(tiny_release(version, model=model)[1], serial=version))
        slots.confirm()
    kept = {path.name for path in (tmp_path / "slots" / "graphs").iterdir()}
    assert kept == {graph_files(model)[0].graphs_sha256 for model in ("tiny", "c")}


def test_missing_slot_and_graphs_do_not_stop_inference(tmp_path: Path) -> None:
    install(Slots(tmp_path), 1)
    install(Slots(tmp_path), 2)
    shutil.rmtree(tmp_path / "slots" / "current")
    shutil.rmtree(tmp_path / "slots" / "graphs")
    assert version_of(Slots(tmp_path)) == 1


def crash_everywhere(tmp_path: Path, what: str) -> list[dict[str, object]]:
    command = [sys.executable, "-m", "tests.edge.crash_swap", str(tmp_path), what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=300)
    results: list[dict[str, object]] = json.loads(done.stdout)
    return results


def test_promotion_killed_anywhere_leaves_the_old_or_the_new_release(tmp_path: Path) -> None:
    results = crash_everywhere(tmp_path, "promote")
    assert len(results) > 40
    for found in results:
        assert found["version"] in (2, 3), found
        assert found["on_probation"] is (found["version"] == 3), found
        assert found["trains"], found
        assert found["left"] == [], found
        assert found["quarantine"] is False, found
        assert found["again"] == 3, found
    versions = [found["version"] for found in results]
    assert versions == sorted(versions), "a later kill never undoes what an earlier one had reached"
    assert versions[0] == 2
    assert versions[-1] == 3


def test_roll_back_killed_anywhere_ends_at_the_last_good_release(tmp_path: Path) -> None:
    results = crash_everywhere(tmp_path, "roll_back")
    assert len(results) > 5
    for found in results:
        assert found["version"] in (1, 2), found
        assert found["version"] == (1 if found["refused"] else 2), found
        assert found["left"] == [], found
        assert found["quarantine"] is False, found
    assert results[-1]["version"] == 1


def test_refused_releases_are_capped() -> None:
    standing = Standing()
    for number in range(100):
        standing = standing.rolled_back(f"{number:064x}")
    assert len(standing.refused) == 32
    assert standing.refused[-1] == f"{99:064x}"
    assert Standing.from_bytes(standing.to_bytes()) == standing
