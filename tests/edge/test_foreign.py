"""A state folder in which something lies that cannot be what it is called: the agent's database opens all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.release.slots import Slots
from edge_agent.store.storage import open_database
from tests.edge.tiny_release import tiny_release


def prepare(folder: Path) -> None:
    """A device that serves a release."""
    database = open_database(folder)
    database.vault.seal("samples", b"", b"")
    database.close()
    slots = Slots(folder)
    slots.promote(slots.stage(tiny_release(1)[1], serial=1))
    slots.confirm()


FILES = ("FORMAT", "EPOCH", "agent.db", "agent.db-wal", "agent.db-shm", "at_rest/ring", "slots/STATE.json")


@pytest.mark.parametrize("name", [*FILES, "slots/current/int8.onnx"])
def test_folder_in_the_place_of_a_file_is_quarantined_and_the_device_serves(
    tmp_path: Path, name: str
) -> None:
    prepare(tmp_path)
    place = tmp_path / name
    place.unlink(missing_ok=True)
    (place / "inside").mkdir(parents=True)
    (place / "inside" / "data").write_bytes(b"what somebody put there")
    database = open_database(tmp_path)
    contents = Slots(tmp_path, quarantine=database.quarantine).current()
    assert contents is not None
    assert contents.int8()
    entries = database.quarantine.entries()
    assert [entry[0].partition("-")[2] for entry in entries] == [place.name]
    assert "not a file" in entries[0][2]
    database.close()
    again = open_database(tmp_path)
    assert again.quarantine.kept_total == 0, "once is enough"
    again.close()


@pytest.mark.parametrize("name", ["at_rest", "slots", "slots/graphs", "tuf", "quarantine"])
def test_file_in_the_place_of_a_folder_is_quarantined(tmp_path: Path, name: str) -> None:
    open_database(tmp_path).close()
    place = tmp_path / name
    if place.is_dir():
        for inner in place.iterdir():
            inner.unlink()
        place.rmdir()
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(b"what somebody put there")
    database = open_database(tmp_path)
    Slots(tmp_path, quarantine=database.quarantine)
    assert len(database.quarantine.entries()) == 1
    assert database.quarantine.kept_total == 1
    database.close()


def test_link_to_what_is_right_is_right(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    state = tmp_path / "state"
    state.mkdir()
    (state / "slots").symlink_to(elsewhere)
    database = open_database(state)
    assert not database.quarantine.entries()
    assert (state / "slots").is_symlink()
    database.close()
