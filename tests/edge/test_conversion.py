"""A database of the format before, whose rows lie in the clear, is sealed at the first start, whole or not at all."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_agent.store.outbox import Outbox
from edge_agent.store.samples import SampleStore
from edge_agent.store.storage import open_database
from tests.edge.tiny_release import SteppedClock

SECRET = b"what the sensor saw on Tuesday! " * 16
WINDOW = np.frombuffer(SECRET, "<f4").reshape(8, 16)
ROOT = Path(__file__).resolve().parents[2]
WRITER = Path(__file__).with_name("plain_database.py")


def files_with(folder: Path, wanted: bytes) -> list[str]:
    return [path.name for path in sorted(folder.rglob("*")) if path.is_file() and wanted in path.read_bytes()]


def plain_folder(folder: Path, *, samples: int = 0) -> Path:
    """A state folder as the version before left it when it was killed: with a write-ahead log, and a quarantine."""
    folder.mkdir()
    subprocess.run(
        [sys.executable, str(WRITER), str(folder), SECRET.hex(), str(samples)], check=True, timeout=60
    )
    (folder / "EPOCH").write_text("500\n")
    kept = folder / "quarantine"
    kept.mkdir()
    (kept / "00000001-outbox-row").write_bytes(SECRET * 5000)
    (kept / "00000001-outbox-row.reason").write_text("damaged\n")
    assert files_with(folder, SECRET[:16])
    return folder


def check_converted(folder: Path) -> None:
    database = open_database(folder, clock=SteppedClock())
    assert files_with(folder, SECRET[:16]) == []
    store, outbox = SampleStore(database), Outbox(database)
    x, y = store.windows("train")
    assert y.tolist() == [2, -1]
    np.testing.assert_array_equal(x[0], WINDOW)
    assert store.was_forgotten(9)
    assert store.add(WINDOW, 1, 0.0) == 10
    (row,) = outbox.pending()
    assert (row.update_id, row.body, row.sealed, row.kem_key_id) == (bytes([1]) * 16, SECRET, b"sealed", b"")
    assert outbox.totals() == {"stored": 1, "refused": 0, "expired": 0, "evicted": 0, "destroyed": 1}
    assert database.epoch == 500
    assert database.reserve_numbers(1) == (500, 257)
    assert database.quarantine.read("00000001-outbox-row") == SECRET * 5000
    assert database.recovered_total == 0
    assert {path.name for path in folder.iterdir()} >= {
        "agent.db",
        "EPOCH",
        "FORMAT",
        "at_rest",
        "quarantine",
    }
    assert not [path.name for path in folder.iterdir() if path.name.startswith("agent.db.")]
    database.close()


def test_database_of_the_format_before_is_sealed_at_the_first_start(tmp_path: Path) -> None:
    folder = plain_folder(tmp_path / "device")
    check_converted(folder)
    for path in folder.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.name == "EPOCH", path


@pytest.mark.parametrize("renames", range(6))
def test_power_cut_while_a_database_is_sealed_leaves_one_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    folder = plain_folder(tmp_path / "device")
    done = itertools.count()
    real = os.replace

    def cut(*arguments: object) -> None:
        if next(done) >= renames:
            raise SystemExit("the power is gone")
        real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", cut)
        with pytest.raises(SystemExit):
            open_database(folder, clock=SteppedClock())
    check_converted(folder)


def test_disk_without_room_for_two_databases_costs_the_samples_and_not_the_start(tmp_path: Path) -> None:
    folder = plain_folder(tmp_path / "device", samples=2000)
    size = (folder / "agent.db").stat().st_size
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))\n"
        "from edge_agent.store.storage import open_database\n"
        "open_database(sys.argv[1]).close()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60, cwd=ROOT)
    database = open_database(folder, clock=SteppedClock())
    assert [row.body for row in Outbox(database).pending()] == [SECRET]
    assert SampleStore(database).counts()["samples"] == 0
    assert SampleStore(database).add(WINDOW, 1, 0.0) == 2100
    assert files_with(folder, SECRET[:16]) == []
