"""A write-ahead log with flipped bits: what was committed and synced behind them is not dropped without a word."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.store.log_mending import mend_log
from edge_agent.store.outbox import Outbox
from edge_agent.store.storage import DATABASE_NAME, Database, open_database

HEAD_BYTES, FRAME_BYTES = 32, 4120
ROWS = 12


@dataclass(frozen=True)
class Log:
    """A database and the log that a crash left beside it; each row is a commit."""

    folder: Path
    raw: bytes

    @property
    def frames(self) -> int:
        return (len(self.raw) - HEAD_BYTES) // FRAME_BYTES

    def rows(self, raw: bytes) -> tuple[str, int]:
        """What becomes of another log in its place: what mending says of it, and how many rows are as they were."""
        place = self.folder / "try.db"
        for suffix in ("-wal", "-shm"):
            place.with_name(f"try.db{suffix}").unlink(missing_ok=True)
        shutil.copy(self.folder / "whole.db", place)
        log = place.with_name("try.db-wal")
        log.write_bytes(raw)
        outcome = mend_log(log)
        with closing(sqlite3.connect(place)) as connection:
            try:
                found = connection.execute("SELECT number, body FROM kept").fetchall()
            except sqlite3.DatabaseError:
                found = []
        return outcome, sum(body == body_of(number) for number, body in found)


def body_of(number: int) -> bytes:
    return random.Random(number).randbytes(3000 + number)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    folder = tmp_path_factory.mktemp("log")
    place = folder / "made.db"
    connection = sqlite3.connect(place, isolation_level=None)
    for pragma in ("page_size = 4096", "journal_mode = WAL", "wal_autocheckpoint = 0"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("CREATE TABLE kept (number INTEGER PRIMARY KEY, body BLOB)")
    for number in range(ROWS):
        connection.execute("INSERT INTO kept VALUES (?, ?)", (number, body_of(number)))
    shutil.copy(place, folder / "whole.db")
    raw = place.with_name("made.db-wal").read_bytes()
    connection.close()
    return Log(folder, raw)


def last_transaction(raw: bytes) -> int:
    """Its first frame: nobody can tell whether it was damaged so badly or never written whole."""
    frames = (len(raw) - HEAD_BYTES) // FRAME_BYTES
    commits = [
        at for at in range(frames) if any(raw[(place := HEAD_BYTES + at * FRAME_BYTES) + 4 : place + 8])
    ]
    return commits[-2] + 1


def flipped(raw: bytes, place: int, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_log_of_a_crash_is_whole_and_is_left_alone(log: Log) -> None:
    assert log.rows(log.raw) == ("whole", ROWS)


@pytest.mark.parametrize("seed", range(2))
def test_one_flipped_bit_in_a_frame_costs_no_commit_behind_it(log: Log, seed: int) -> None:
    rng = random.Random(seed)
    mended = 0
    for frame in range(0, log.frames, 2):
        place = HEAD_BYTES + frame * FRAME_BYTES + rng.randrange(FRAME_BYTES)
        outcome, rows = log.rows(flipped(log.raw, place, rng))
        assert outcome in ("mended", "damaged"), place
        assert rows == ROWS or outcome == "damaged", place
        mended += outcome == "mended"
    assert mended > log.frames / 4


def test_one_flipped_bit_in_the_header_costs_nothing(log: Log) -> None:
    rng = random.Random(0)
    for place in range(0, HEAD_BYTES, 3):
        assert log.rows(flipped(log.raw, place, rng)) == ("mended", ROWS), place


def test_many_flipped_bits_are_damage_that_is_said(log: Log) -> None:
    rng = random.Random(1)
    for frame in range(last_transaction(log.raw)):
        changed = log.raw
        for _ in range(8):
            changed = flipped(changed, HEAD_BYTES + frame * FRAME_BYTES + rng.randrange(FRAME_BYTES), rng)
        assert log.rows(changed)[0] == "damaged", frame


def test_what_a_power_cut_left_half_written_is_not_brought_back(log: Log) -> None:
    for frame in range(3, log.frames):
        cut = HEAD_BYTES + frame * FRAME_BYTES
        torn = log.raw[: cut + 2000] + bytes(FRAME_BYTES - 2000)
        assert log.rows(torn)[0] == "whole"


def test_last_transaction_with_a_torn_frame_is_dropped_as_a_whole(log: Log) -> None:
    """Its commit may be on the disk before the rest of it is."""
    begin = last_transaction(log.raw)
    assert begin < log.frames - 1
    for frame in range(begin, log.frames):
        middle = HEAD_BYTES + frame * FRAME_BYTES + 2000
        torn = log.raw[:middle] + b"\xa5" * 2000 + log.raw[middle + 2000 :]
        assert log.rows(torn) == ("whole", ROWS - 1), frame


def test_bytes_of_something_else_are_no_log(log: Log) -> None:
    assert log.rows(random.Random(2).randbytes(len(log.raw)))[0] == "foreign"


def test_no_log_and_an_empty_one_are_whole(tmp_path: Path) -> None:
    assert mend_log(tmp_path / "absent-wal") == "whole"
    (tmp_path / "empty-wal").touch()
    assert mend_log(tmp_path / "empty-wal") == "whole"


# ---- in the agent's database ---------------------------------------------------------------------------------


def put(database: Database, number: int) -> None:
    name = b"%016d" % number
    Outbox(database).put(name, name, "run", number, "up", body_of(number), 1.0, 1e12)


@pytest.mark.parametrize("flips", [1, 8])
def test_update_in_a_damaged_log_is_there_or_counted_as_destroyed(tmp_path: Path, flips: int) -> None:
    crashed = tmp_path / "crashed"
    database = open_database(tmp_path / "made")
    for number in range(4):
        put(database, number)
    shutil.copytree(tmp_path / "made", crashed)
    database.close()
    raw = (crashed / f"{DATABASE_NAME}-wal").read_bytes()
    rng = random.Random(flips)
    for frame in range(0, last_transaction(raw), 5):
        place = tmp_path / "try"
        shutil.copytree(crashed, place)
        changed = raw
        for _ in range(flips):
            changed = flipped(changed, HEAD_BYTES + frame * FRAME_BYTES + rng.randrange(FRAME_BYTES), rng)
        (place / f"{DATABASE_NAME}-wal").write_bytes(changed)
        found = open_database(place)
        outbox = Outbox(found)
        whole = [row.body == body_of(row.round_number) for row in outbox.pending()]
        assert all(whole), frame
        assert len(whole) + outbox.totals()["destroyed"] == 4, frame
        found.close()
        shutil.rmtree(place)


def test_log_that_is_none_goes_to_the_quarantine(tmp_path: Path) -> None:
    open_database(tmp_path).close()
    (tmp_path / f"{DATABASE_NAME}-wal").write_bytes(random.Random(3).randbytes(9000))
    database = open_database(tmp_path)
    assert [name.partition("-")[2] for name, _, _ in database.quarantine.entries()] == [
        f"{DATABASE_NAME}-wal"
    ]
    database.close()


@pytest.mark.parametrize("is_gone", [True, False])
def test_log_of_a_database_that_is_empty_or_gone_keeps_what_is_owed(tmp_path: Path, is_gone: bool) -> None:
    database = open_database(tmp_path / "made")
    for number in range(3):
        put(database, number)
    shutil.copytree(tmp_path / "made", tmp_path / "crashed")
    database.close()
    place = tmp_path / "crashed" / DATABASE_NAME
    place.unlink()
    if not is_gone:
        place.touch()
    found = open_database(tmp_path / "crashed")
    assert [row.round_number for row in Outbox(found).pending()] == [0, 1, 2]
    found.close()
