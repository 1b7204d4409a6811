"""No power cut leaves a device without a release that it can serve, whatever of what was not synced is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_agent.release.slots import Slots
from tests.edge.crash_states import Disk, crash_states, lay_down, record
from tests.edge.crash_swap import prepare

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed here")


@needs_strace
@pytest.mark.slow
@pytest.mark.parametrize(("what", "versions"), [("promote", {2, 3}), ("roll_back", {1, 2})])
def test_every_state_after_a_power_cut_serves_a_release(
    tmp_path: Path, what: str, versions: set[int]
) -> None:
    prepare(tmp_path / "before")
    lines = record(tmp_path / "device", what)
    found, states = set(), crash_states(tmp_path / "before", tmp_path / "device", lines)
    count = 0
    for count, state in enumerate(states, start=1):  # noqa: B007
        place = tmp_path / "state"
        lay_down(state, place)
        slots = Slots(place)
        contents = slots.current()
        assert contents is not None, sorted(state)
        assert contents.int8(), sorted(state)
        assert contents.float32(), sorted(state)
        assert not (place / "quarantine").exists(), "nothing that has its name is half on the disk"
        if contents.version == 3:
            assert slots.on_probation
            back = slots.roll_back()
            assert back is not None
            assert back.version == 2, "the way back is there before the way forward"
        else:
            again = Slots(place).current()
            assert again is not None
            assert again.version == contents.version, sorted(state)
        found.add(contents.version)
        shutil.rmtree(place)
    assert found == versions
    assert count > (50 if what == "promote" else 10)


def test_model_of_a_disk_forgets_what_was_not_synced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_bytes(b"old!")
    disk = Disk.of(tmp_path)
    node = disk.make("a/.new", is_folder=False)
    disk.write(node, b"new!")
    left = {tuple(sorted(state.items())) for state in disk.states()}
    base = (("/a", None), ("/a/old", b"old!"))
    assert left == {base, *((("/a", None), ("/a/.new", data), base[1]) for data in (b"new!", b"ne", b""))}
    disk.sync(node)
    disk.rename("a/.new", "a/old")
    assert (("/a", None), ("/a/old", b"new!")) in {tuple(sorted(state.items())) for state in disk.states()}
    folder = disk.find("a")
    assert folder is not None
    disk.sync(folder)
    assert list(disk.states()) == [{"/a": None, "/a/old": b"new!"}]
