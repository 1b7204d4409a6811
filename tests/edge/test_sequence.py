"""Numbers of messages: never one twice, whatever happens to the process, the disk or the clock."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.store.sequence import BLOCK, LOW, Sequence
from edge_agent.store.storage import MEMORY, Database, open_database
from tests.edge.tiny_release import SteppedClock
from wire.errors import StorageError

ROOT = Path(__file__).resolve().parents[2]


def test_numbers_count_up_from_one(tmp_path: Path) -> None:
    sequence = Sequence(open_database(tmp_path, clock=SteppedClock(500.0)))
    assert [sequence.next() for _ in range(3)] == [(500, 1), (500, 2), (500, 3)]


def test_block_after_block_has_no_gap_while_the_process_lives(tmp_path: Path) -> None:
    sequence = Sequence(open_database(tmp_path))
    assert [sequence.next()[1] for _ in range(3 * BLOCK)] == list(range(1, 3 * BLOCK + 1))


def test_restart_goes_on_in_the_next_block(tmp_path: Path) -> None:
    clock = SteppedClock(500.0)
    first = Sequence(open_database(tmp_path, clock=clock))
    first.next()
    clock.seconds = 900.0
    assert Sequence(open_database(tmp_path, clock=clock)).next() == (500, BLOCK + 1)


def test_killed_processes_never_use_a_number_twice(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from edge_agent.store.sequence import Sequence\n"
        "from edge_agent.store.storage import open_database\n"
        "sequence = Sequence(open_database(sys.argv[1]))\n"
        "for _ in range(int(sys.argv[2])):\n"
        "    print(*sequence.next(), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    seen: list[tuple[int, ...]] = []
    for count in (1, BLOCK, 5):
        command = [sys.executable, "-c", code, str(tmp_path), str(count)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=60)
        seen += [tuple(map(int, line.split())) for line in done.stdout.decode().splitlines()]
    assert len(seen) == 1 + BLOCK + 5
    assert seen == sorted(set(seen))


def test_two_processes_on_one_folder_never_share_a_number(tmp_path: Path) -> None:
    one, two = (Sequence(open_database(tmp_path)) for _ in range(2))
    numbers = [sequence.next() for _ in range(BLOCK) for sequence in (one, two)]
    assert len(set(numbers)) == len(numbers)


def test_threads_never_share_a_number() -> None:
    sequence = Sequence(open_database(MEMORY))
    numbers: list[tuple[int, int]] = []

    def draw() -> None:
        numbers.extend([sequence.next() for _ in range(400)])

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(numbers)) == 1600


@pytest.mark.parametrize("clock_now", [900.0, 100.0, 0.0])
def test_lost_database_begins_a_higher_epoch_even_with_a_wrong_clock(
    tmp_path: Path, clock_now: float
) -> None:
    epoch, _ = Sequence(open_database(tmp_path, clock=SteppedClock(500.0))).next()
    for path in tmp_path.glob("agent.db*"):
        path.unlink()
    again, seq = Sequence(open_database(tmp_path, clock=SteppedClock(clock_now))).next()
    assert again > epoch
    assert seq == 1


def test_database_from_an_old_backup_begins_a_new_epoch(tmp_path: Path) -> None:
    database = open_database(tmp_path, clock=SteppedClock(500.0))
    Sequence(database).next()
    database.close()
    backup = (tmp_path / "agent.db").read_bytes()
    (tmp_path / "agent.db").unlink()
    database = open_database(tmp_path, clock=SteppedClock(600.0))
    newest = Sequence(database).next()
    database.close()
    (tmp_path / "agent.db").write_bytes(backup)
    assert Sequence(open_database(tmp_path, clock=SteppedClock(400.0))).next() > newest


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE facts SET value = 3 WHERE name = 'reserved_seq'",
        "UPDATE facts SET value = 3 WHERE name = 'epoch'",
        "UPDATE facts SET sha256 = x'00'",
        "DELETE FROM facts",
    ],
)
def test_damaged_numbers_begin_a_new_epoch(tmp_path: Path, damage: str) -> None:
    database = open_database(tmp_path, clock=SteppedClock(500.0))
    before = Sequence(database).next()
    with database.transaction() as connection:
        connection.execute(damage)
    database.close()
    epoch, seq = Sequence(open_database(tmp_path, clock=SteppedClock(500.0))).next()
    assert epoch > before[0]
    assert seq == 1


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xff", b"99999999999999999999"])
def test_damaged_epoch_file_changes_nothing(tmp_path: Path, content: bytes) -> None:
    before = Sequence(open_database(tmp_path, clock=SteppedClock(500.0))).next()
    (tmp_path / "EPOCH").write_bytes(content)
    after = Sequence(open_database(tmp_path, clock=SteppedClock(500.0))).next()
    assert after == (before[0], BLOCK + 1)
    assert (tmp_path / "EPOCH").read_bytes() == b"500\n"


def test_nothing_is_handed_out_when_the_block_cannot_be_reserved(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    sequence = Sequence(database)
    sequence.next()
    database.close()
    assert [sequence.next()[1] for _ in range(BLOCK - 1)] == list(range(2, BLOCK + 1))
    with pytest.raises(StorageError):
        sequence.next()
    assert os.path.exists(tmp_path / "agent.db")


@pytest.mark.parametrize("before", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_number_that_left_before_its_transaction_failed_never_comes_again(
    tmp_path: Path, before: int
) -> None:
    database = open_database(tmp_path)
    sequence = Sequence(database)
    seen = [sequence.next() for _ in range(1 + before)]
    with pytest.raises(StorageError):
        fail_after(database, lambda: seen.extend(sequence.next() for _ in range(LOW)))
    seen += [sequence.next() for _ in range(3)]
    database.close()
    again = Sequence(open_database(tmp_path))
    seen += [again.next() for _ in range(3)]
    assert len(set(seen)) == len(seen)


def test_transaction_that_needs_more_numbers_than_are_reserved_gets_none(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    sequence = Sequence(database)
    sequence.next()
    with pytest.raises(StorageError, match="inside of a transaction"):
        fail_after(database, lambda: [sequence.next() for _ in range(2 * BLOCK)])
    assert sequence.next()[1] > BLOCK


def fail_after(database: Database, call: Callable[[], object]) -> None:
    """A transaction that does what is asked and cannot be committed then."""
    with database.transaction():
        call()
        raise StorageError("the disk is full")
