"""The outbox and the database under it: what is owed survives, ends once, and damage is found and counted."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_agent.store.orders import Orders, ReplayWindows
from edge_agent.store.outbox import END_STATES, ENDED_ROWS_KEPT, Outbox
from edge_agent.store.quarantine import Quarantine
from edge_agent.store.samples import SampleStore
from edge_agent.store.sequence import Sequence
from edge_agent.store.storage import MEMORY, Database, open_database
from edge_agent.store.time_floor import FlooredClock
from tests.edge.tiny_release import SteppedClock
from wire.errors import ReplayError, StorageError

LATER = 10_000.0


def named(number: int) -> bytes:
    return number.to_bytes(16, "big")


def put(
    outbox: Outbox, number: int, body: bytes = b"body", *, deadline: float = LATER, now: float = 0.0
) -> bool:
    return outbox.put(named(number), named(number + 1000), "run", 3, "up", body, now, deadline)


def seal(outbox: Outbox, number: int, sealed: bytes = b"sealed") -> bytes:
    transfer = hashlib.sha256(sealed).digest()
    outbox.sealed(named(number), sealed, transfer)
    return transfer


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_database(tmp_path, clock=SteppedClock())


@pytest.fixture
def outbox(database: Database) -> Outbox:
    return Outbox(database)


def test_row_is_there_after_a_restart(tmp_path: Path, database: Database, outbox: Outbox) -> None:
    put(outbox, 1, b"first")
    transfer = seal(outbox, 1, b"sealed bytes")
    put(outbox, 2, b"second")
    database.close()
    rows = Outbox(open_database(tmp_path)).pending()
    assert [(row.update_id, row.body) for row in rows] == [(named(1), b"first"), (named(2), b"second")]
    assert (rows[0].sealed, rows[0].transfer) == (b"sealed bytes", transfer)
    assert (rows[0].run, rows[0].round_number, rows[0].kind, rows[0].deadline) == ("run", 3, "up", LATER)
    assert rows[1].sealed is None


def test_row_survives_a_process_that_never_closed(tmp_path: Path, outbox: Outbox) -> None:
    put(outbox, 1)
    again = Outbox(open_database(tmp_path))
    assert again.depth() == 1


def test_same_update_id_twice_is_one_row(outbox: Outbox) -> None:
    assert put(outbox, 1, b"one")
    assert not put(outbox, 1, b"two")
    assert [row.body for row in outbox.pending()] == [b"one"]
    transfer = seal(outbox, 1)
    outbox.end(named(1), "stored", transfer=transfer)
    assert not put(outbox, 1, b"three")
    assert outbox.depth() == 0


@pytest.mark.parametrize(
    ("verdict", "state"), [("stored", "stored"), ("duplicate", "stored"), ("refused", "refused")]
)
def test_receipt_ends_its_row_once(outbox: Outbox, verdict: str, state: str) -> None:
    put(outbox, 1)
    transfer = seal(outbox, 1)
    assert outbox.end(named(1), verdict, transfer=transfer, reason="why", now=5.0)
    assert not outbox.end(named(1), verdict, transfer=transfer)
    assert outbox.depth() == 0
    assert outbox.ended(named(1)) == (state, "why")
    assert outbox.totals() == {name: int(name == state) for name in END_STATES}


def test_receipt_for_other_bytes_ends_nothing(outbox: Outbox) -> None:
    put(outbox, 1)
    assert not outbox.end(named(1), "stored", transfer=b"")
    transfer = seal(outbox, 1)
    for forged in (b"", bytes(32), transfer[:-1], hashlib.sha256(b"other").digest()):
        assert not outbox.end(named(1), "stored", transfer=forged)
    assert not outbox.end(named(2), "stored", transfer=transfer)
    assert outbox.depth() == 1


@pytest.mark.parametrize("verdict", ["missing", "", "open", "evicted", "destroyed"])
def test_other_words_end_nothing(outbox: Outbox, verdict: str) -> None:
    put(outbox, 1)
    assert not outbox.end(named(1), verdict, transfer=seal(outbox, 1))
    assert outbox.depth() == 1


def test_receipt_of_an_earlier_sealing_ends_nothing(outbox: Outbox) -> None:
    put(outbox, 1)
    before = seal(outbox, 1, b"with the old key")
    after = seal(outbox, 1, b"with the new key")
    assert not outbox.end(named(1), "stored", transfer=before)
    assert outbox.end(named(1), "stored", transfer=after)


def test_transfer_finds_its_row(outbox: Outbox) -> None:
    put(outbox, 1)
    transfer = seal(outbox, 1)
    assert outbox.find_transfer(transfer) == named(1)
    assert outbox.find_transfer(bytes(32)) is None
    outbox.end(named(1), "stored", transfer=transfer)
    assert outbox.find_transfer(transfer) is None
    assert outbox.find(named(1)) is None


def test_sealed_refuses_a_digest_of_other_bytes(outbox: Outbox) -> None:
    put(outbox, 1)
    with pytest.raises(StorageError):
        outbox.sealed(named(1), b"sealed", bytes(32))
    with pytest.raises(StorageError):
        outbox.sealed(named(9), b"sealed", hashlib.sha256(b"sealed").digest())


def test_deadline_ends_rows(outbox: Outbox) -> None:
    put(outbox, 1, deadline=10.0)
    put(outbox, 2, deadline=20.0)
    assert outbox.expire(15.0) == [named(1)]
    assert outbox.expire(15.0) == []
    assert [row.update_id for row in outbox.pending()] == [named(2)]
    assert outbox.end(named(2), "expired")
    assert outbox.totals()["expired"] == 2


def test_full_outbox_drops_the_expired_then_the_oldest(database: Database) -> None:
    outbox = Outbox(database, max_bytes=1000)
    put(outbox, 1, bytes(400), deadline=LATER)
    put(outbox, 2, bytes(400), deadline=5.0)
    put(outbox, 3, bytes(400), now=6.0)
    assert [row.update_id for row in outbox.pending()] == [named(1), named(3)]
    put(outbox, 4, bytes(900), now=7.0)
    assert [row.update_id for row in outbox.pending()] == [named(4)]
    assert (outbox.totals()["expired"], outbox.totals()["evicted"]) == (1, 2)
    assert outbox.ended(named(1)) == ("evicted", "the outbox was full")


def test_evaluations_make_room_before_updates(database: Database) -> None:
    outbox = Outbox(database, max_bytes=1000)
    put(outbox, 1, bytes(300))
    outbox.put(named(2), named(1002), "run", 3, "ev", bytes(300), 0.0, LATER)
    put(outbox, 3, bytes(300))
    put(outbox, 4, bytes(300))
    assert [row.update_id for row in outbox.pending()] == [named(1), named(3), named(4)]
    assert outbox.ended(named(2)) == ("evicted", "the outbox was full")


# --- what the cloud has acknowledged, and has no backup of
# ---------------------------------------------------------------------------------------------


def acknowledge(outbox: Outbox, number: int, *, cloud_row: int, durable: int = 0) -> None:
    transfer = seal(outbox, number)
    assert outbox.end(named(number), "stored", transfer=transfer, cloud_row=cloud_row, durable=durable)


def test_acknowledged_update_is_kept_until_it_is_durable(
    tmp_path: Path, database: Database, outbox: Outbox
) -> None:
    for number in (1, 2, 3):
        put(outbox, number, b"body %d" % number)
    acknowledge(outbox, 1, cloud_row=11)
    acknowledge(outbox, 2, cloud_row=12)
    assert (outbox.depth(), outbox.copies(), outbox.totals()["stored"]) == (1, 2, 2)
    database.close()
    outbox = Outbox(open_database(tmp_path))
    assert outbox.copies() == 2
    assert [row.update_id for row in outbox.pending()] == [named(3)]
    acknowledge(outbox, 3, cloud_row=13, durable=11)
    assert outbox.copies() == 2
    put(outbox, 4)
    acknowledge(outbox, 4, cloud_row=14, durable=14)
    assert outbox.copies() == 0
    assert outbox.open_bytes() == 0
    assert outbox.totals()["stored"] == 4


@pytest.mark.parametrize("verdict", ["stored", "duplicate"])
def test_receipt_of_a_durable_row_or_without_the_promise_keeps_no_copy(outbox: Outbox, verdict: str) -> None:
    for number, (cloud_row, durable) in enumerate(((0, 0), (5, 5), (5, 9)), 1):
        put(outbox, number)
        transfer = seal(outbox, number)
        assert outbox.end(named(number), verdict, transfer=transfer, cloud_row=cloud_row, durable=durable)
        assert (outbox.copies(), outbox.open_bytes()) == (0, 0)


def test_refused_update_is_not_kept_whatever_is_durable(outbox: Outbox) -> None:
    put(outbox, 1)
    assert outbox.end(named(1), "refused", transfer=seal(outbox, 1), cloud_row=7)
    assert outbox.copies() == 0


def test_cloud_that_lost_what_it_acknowledged_is_offered_it_again_and_it_counts_once(outbox: Outbox) -> None:
    for number in (1, 2):
        put(outbox, number, b"body %d" % number)
    acknowledge(outbox, 1, cloud_row=11)
    acknowledge(outbox, 2, cloud_row=12, durable=11)
    assert outbox.offer_again() == [(named(2), LATER)]
    assert outbox.offer_again() == []
    (row,) = outbox.pending()
    assert (row.update_id, row.body, row.sealed) == (named(2), b"body 2", None)
    assert outbox.totals()["stored"] == 1
    assert outbox.ended(named(2)) is None
    assert outbox.end(named(2), "refused", transfer=seal(outbox, 2), reason="round_closed")
    assert (outbox.totals()["stored"], outbox.totals()["refused"]) == (1, 1)


def test_copy_goes_with_its_deadline_and_before_anything_that_is_owed(database: Database) -> None:
    outbox = Outbox(database, max_bytes=1000)
    put(outbox, 1, bytes(400))
    put(outbox, 2, bytes(400))
    acknowledge(outbox, 2, cloud_row=5)
    put(outbox, 3, bytes(400))
    assert outbox.copies() == 0
    assert [row.update_id for row in outbox.pending()] == [named(1), named(3)]
    assert outbox.totals() == {"stored": 1, "refused": 0, "expired": 0, "evicted": 0, "destroyed": 0}
    outbox.end(named(1), "stored", transfer=seal(outbox, 1), cloud_row=6)
    assert outbox.expire(LATER + 1) == [named(3)]
    assert outbox.copies() == 0
    assert outbox.ended(named(1)) == ("stored", "")


def test_update_larger_than_the_outbox_is_an_error_and_drops_nothing(database: Database) -> None:
    outbox = Outbox(database, max_bytes=1000)
    put(outbox, 1, bytes(900))
    with pytest.raises(StorageError) as caught:
        put(outbox, 2, bytes(1001))
    assert caught.value.facts == {"size_bytes": 1001, "limit_bytes": 1000}
    assert outbox.depth() == 1


def test_full_disk_is_an_error_and_what_is_there_can_still_end(tmp_path: Path) -> None:
    outbox = Outbox(open_database(tmp_path, max_bytes=600_000), max_bytes=10_000_000)

    def fill() -> None:
        for number in range(1, 100):
            put(outbox, number, random.Random(number).randbytes(50_000))

    with pytest.raises(StorageError) as caught:
        fill()
    assert caught.value.facts["full"]
    assert "free space" in caught.value.hint
    kept = outbox.depth()
    assert kept > 5
    assert outbox.expire(LATER + 1) == [named(row) for row in range(1, kept + 1)]
    assert put(outbox, 200, bytes(50_000))


def test_ended_rows_are_capped(outbox: Outbox) -> None:
    with outbox._database.transaction():
        for number in range(ENDED_ROWS_KEPT + 50):
            put(outbox, number, deadline=1.0)
        outbox.expire(2.0)
    rows = outbox._database.read("SELECT count(*) FROM outbox")[0][0]
    assert rows == ENDED_ROWS_KEPT
    assert outbox.totals()["expired"] == ENDED_ROWS_KEPT + 50


def test_damaged_row_is_quarantined_and_the_rest_goes_on(tmp_path: Path, outbox: Outbox) -> None:
    for number in (1, 2, 3):
        put(outbox, number, b"body %d" % number)
    with outbox._database.transaction() as connection:
        connection.execute("UPDATE outbox SET body = ? WHERE update_id = ?", (b"bodY 2", named(2)))
    assert outbox.owed() == [(named(1), LATER), (named(3), LATER)]
    assert [row.update_id for row in outbox.pending()] == [named(1), named(3)]
    assert outbox.ended(named(2)) == ("destroyed", "damaged on disk")
    assert outbox.totals()["destroyed"] == 1
    ((name, _, reason),) = outbox._database.quarantine.entries()
    assert name.endswith(f"outbox-{named(2).hex()}")
    assert outbox._database.quarantine.read(name) == b"bodY 2"
    assert "damaged on disk" in reason


@pytest.mark.parametrize(
    "column",
    [
        "round_number = 4",
        "run = 'other'",
        "kind = 'ev'",
        "order_id = x'00'",
        "body = 5",
        "state = 'opem', run = 'r'",
    ],
)
def test_damage_in_any_column_is_found(outbox: Outbox, column: str) -> None:
    put(outbox, 1)
    with outbox._database.transaction() as connection:
        connection.execute(f"UPDATE outbox SET {column}")
    assert outbox.pending() == []
    assert outbox.totals()["destroyed"] == 1


def test_damaged_sealed_bytes_are_sealed_again(outbox: Outbox) -> None:
    put(outbox, 1)
    seal(outbox, 1)
    with outbox._database.transaction() as connection:
        connection.execute("UPDATE sealings SET sealed = x'00'")
    (row,) = outbox.pending()
    assert (row.body, row.sealed, row.transfer) == (b"body", None, None)


def test_damaged_body_is_found_when_it_is_sent_and_a_receipt_ends_it_before(outbox: Outbox) -> None:
    """The cloud has what it acknowledges, whatever became of our copy."""
    for number in (1, 2):
        put(outbox, number)
    transfers = [seal(outbox, number, b"sealed %d" % number) for number in (1, 2)]
    with outbox._database.transaction() as connection:
        connection.execute("UPDATE outbox SET body = x'00'")
    assert outbox.find_transfer(transfers[0]) == named(1)
    assert outbox.end(named(1), "stored", transfer=transfers[0])
    assert outbox.find(named(2)) is None
    assert outbox.find_transfer(transfers[1]) is None
    assert (outbox.totals()["stored"], outbox.totals()["destroyed"]) == (1, 1)


def test_sealed_bytes_go_with_their_row(outbox: Outbox) -> None:
    for number in (1, 2, 3, 4):
        put(outbox, number, deadline=10.0 if number == 2 else LATER)
        seal(outbox, number, b"sealed %d" % number)
    outbox.end(named(1), "stored", transfer=hashlib.sha256(b"sealed 1").digest())
    outbox.expire(11.0)
    rows = outbox._database.read("SELECT row, sealed FROM sealings ORDER BY row")
    assert rows == [(3, b"sealed 3"), (4, b"sealed 4")]


def test_sealing_and_ending_a_row_do_not_write_its_body_again(tmp_path: Path, outbox: Outbox) -> None:
    """Flash cards wear: a row's bytes are written when they come, and no more often."""
    put(outbox, 1, random.Random(1).randbytes(1_000_000))
    outbox._database.erase_leftovers()
    seal(outbox, 1, b"short")
    assert (tmp_path / "agent.db-wal").stat().st_size < 100_000


# --- orders and windows
# ---------------------------------------------------------------------------------------------


def test_order_is_accepted_once_and_knows_its_update(database: Database, outbox: Outbox) -> None:
    orders = Orders(database)
    assert orders.accept(named(1001), "train", "run", 3, 5.0)
    assert not orders.accept(named(1001), "train", "run", 3, 6.0)
    found = orders.find(named(1001))
    assert found is not None
    assert (found.kind, found.run, found.round_number, found.update_id, found.seen_at) == (
        "train",
        "run",
        3,
        None,
        5.0,
    )
    assert [order.order_id for order in orders.unanswered()] == [named(1001)]
    put(outbox, 1)
    found = orders.find(named(1001))
    assert found is not None
    assert found.update_id == named(1)
    assert orders.unanswered() == []
    assert orders.find(named(5)) is None


def test_forgotten_order_can_be_tried_again(database: Database) -> None:
    orders = Orders(database)
    orders.accept(named(1), "train", "run", 1, 0.0)
    orders.forget(named(1))
    assert orders.accept(named(1), "train", "run", 1, 0.0)


def test_orders_are_capped(database: Database) -> None:
    orders = Orders(database, max_orders=10)
    for number in range(25):
        orders.accept(named(number), "train", "run", number, 0.0)
    assert [order.round_number for order in orders.unanswered()] == list(range(15, 25))


def test_window_lets_each_message_in_once_across_restarts(tmp_path: Path, database: Database) -> None:
    windows = ReplayWindows(database)
    for seq in (1, 5, 3):
        windows.accept("cm", 9, seq)
    windows.accept("ak", 9, 3)
    database.close()
    windows = ReplayWindows(open_database(tmp_path))
    with pytest.raises(ReplayError):
        windows.accept("cm", 9, 3)
    with pytest.raises(ReplayError):
        windows.accept("cm", 8, 100)
    windows.accept("cm", 9, 4)
    windows.accept("cm", 10, 1)


def test_window_does_not_move_when_the_message_was_not_stored(database: Database) -> None:
    windows = ReplayWindows(database)

    def store() -> None:
        with database.transaction() as connection:
            windows.accept("cm", 1, 1)
            connection.execute("INSERT INTO orders VALUES (NULL, NULL, NULL, NULL, NULL, NULL)")

    with pytest.raises(StorageError):
        store()
    windows.accept("cm", 1, 1)


def test_damaged_window_starts_anew(database: Database) -> None:
    windows = ReplayWindows(database)
    windows.accept("cm", 1, 1)
    with database.transaction() as connection:
        connection.execute("UPDATE windows SET bitmap = 'nonsense'")
    windows.accept("cm", 1, 2)


def test_time_floor_moves_only_forward(tmp_path: Path, database: Database) -> None:
    clock = FlooredClock(SteppedClock(100.0), database)
    assert clock.now() == 100.0
    clock.raise_to(500.0)
    clock.raise_to(300.0)
    assert (clock.now(), clock.floor, clock.monotonic()) == (500.0, 500.0, 100.0)
    database.close()
    again = FlooredClock(SteppedClock(100.0), open_database(tmp_path))
    assert again.now() == 500.0
    assert FlooredClock(SteppedClock(900.0), open_database(tmp_path)).now() == 900.0


# --- the database
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"not a database at all " * 500, bytes(8192), b"SQLite format 3\0" + bytes(90)]
)
def test_damaged_file_is_replaced(tmp_path: Path, content: bytes) -> None:
    first = open_database(tmp_path, clock=SteppedClock(50.0))
    put(Outbox(first), 1)
    first.close()
    (tmp_path / "agent.db").write_bytes(content)
    again = open_database(tmp_path, clock=SteppedClock(10.0))
    assert again.epoch > first.epoch
    assert Outbox(again).depth() == 0
    assert put(Outbox(again), 1)
    if content:
        assert again.recovered_total == 1
        ((name, _, _),) = again.quarantine.entries()
        assert again.quarantine.read(name) == content


def test_damage_found_while_running_is_replaced_too(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    outbox = Outbox(database)
    for number in range(40):
        put(outbox, number, bytes(5000))
    database.close()
    path = tmp_path / "agent.db"
    raw = bytearray(path.read_bytes())
    for page in range(3, len(raw) // 4096):
        raw[page * 4096 : page * 4096 + 16] = b"\xff" * 16
    path.write_bytes(raw)
    database = open_database(tmp_path)
    outbox = Outbox(database)
    with pytest.raises(StorageError) as caught:
        outbox.pending()
    assert caught.value.facts["damaged"]
    assert database.recovered_total == 1
    salvaged = [row.update_id for row in outbox.pending()]
    assert database.salvaged["outbox"] == len(salvaged)
    assert put(outbox, 50)
    assert [row.update_id for row in outbox.pending()] == [*salvaged, named(50)]


def test_what_can_be_read_of_a_damaged_file_is_salvaged(tmp_path: Path) -> None:
    database = open_database(tmp_path, clock=SteppedClock(50.0))
    outbox = Outbox(database)
    for number in range(40):
        put(outbox, number, bytes([number]) * 5000)
    SampleStore(database).add(np.ones(3, np.float32), 1, 0.0)
    before = Sequence(database).next()
    database.set_fact("time_floor", 77.0)
    database.close()
    path = tmp_path / "agent.db"
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2 // 4096 * 4096
    raw[middle : middle + 4096] = b"\xff" * 4096
    path.write_bytes(raw)
    database = open_database(tmp_path, clock=SteppedClock(50.0))
    outbox = Outbox(database)
    with contextlib.suppress(StorageError):
        outbox.pending()
    rows = outbox.pending()
    assert len(rows) >= 38
    assert all(row.body == bytes([row.update_id[-1]]) * 5000 for row in rows)
    assert outbox.totals()["destroyed"] == 40 - len(rows)
    assert SampleStore(database).counts()["samples"] == 1
    assert database.fact("time_floor") == 77.0
    assert Sequence(database).next() > before


def test_flipped_bits_never_give_a_wrong_row_or_lose_one_uncounted(tmp_path: Path) -> None:
    """60 files with one flipped bit each: what comes out went in, and what does not come out was counted."""
    database = open_database(tmp_path / "good")
    bodies = {named(number): random.Random(number).randbytes(40_000) for number in range(12)}
    for update_id, body in bodies.items():
        Outbox(database).put(update_id, bytes(16), "run", 1, "up", body, 0.0, LATER)
    database.close()
    raw = (tmp_path / "good" / "agent.db").read_bytes()
    rng = random.Random(3)
    noticed = 0
    for trial in range(60):
        folder = tmp_path / "flipped" / str(trial)
        shutil.copytree(tmp_path / "good" / "at_rest", folder / "at_rest")
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (folder / "agent.db").write_bytes(damaged)
        database = open_database(folder)
        outbox = Outbox(database)
        with contextlib.suppress(StorageError):
            outbox.pending()
        rows = outbox.pending()
        assert all(bodies[row.update_id] == row.body for row in rows)
        assert len(rows) >= len(bodies) - 1
        assert len(rows) + outbox.totals()["destroyed"] == len(bodies)
        noticed += len(rows) < len(bodies) or database.recovered_total > 0
        database.close()
        shutil.rmtree(folder)
    assert noticed > 45


def test_damaged_first_page_loses_nothing(tmp_path: Path) -> None:
    database = open_database(tmp_path / "good")
    for number in range(12):
        put(Outbox(database), number, bytes([number]) * 5000)
    before = Sequence(database).next()
    database.close()
    for trial in range(40):
        folder = tmp_path / str(trial)
        shutil.copytree(tmp_path / "good", folder)
        damaged = bytearray((folder / "agent.db").read_bytes())
        damaged[100 * trial : 100 * trial + 100] = random.Random(trial).randbytes(100)
        (folder / "agent.db").write_bytes(damaged)
        database = open_database(folder)
        assert [row.body for row in Outbox(database).pending()] == [bytes([n]) * 5000 for n in range(12)]
        assert Sequence(database).next() > before
        database.close()


def test_newer_format_is_an_error_and_is_left_alone(tmp_path: Path) -> None:
    open_database(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "agent.db")
    connection.execute("UPDATE format SET version = 99")
    connection.commit()
    connection.close()
    before = (tmp_path / "agent.db").read_bytes()
    with pytest.raises(StorageError, match="format 99"):
        open_database(tmp_path)
    assert (tmp_path / "agent.db").read_bytes() == before


def test_folder_of_another_program_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text("shoal-cloud 1\n")
    with pytest.raises(StorageError) as caught:
        open_database(tmp_path)
    assert "own folder" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["FORMAT"]


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"sh"])
def test_damaged_format_file_is_written_anew(tmp_path: Path, content: bytes) -> None:
    open_database(tmp_path).close()
    (tmp_path / "FORMAT").write_bytes(content)
    open_database(tmp_path).close()
    assert (tmp_path / "FORMAT").read_bytes() == b"shoal-edge 1\n"


@pytest.mark.parametrize("value", [5, 5.0, "5", b"5"])
def test_fact_keeps_its_type_and_is_checked(database: Database, value: int | float | str | bytes) -> None:
    database.set_fact("name", value)
    found = database.fact("name")
    assert found == value
    assert type(found) is type(value)
    assert database.fact("other") is None
    with database.transaction() as connection:
        connection.execute("UPDATE facts SET value = 6 WHERE name = 'name'")
    assert database.fact("name") is None


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        open_database(tmp_path / "file" / "state")


def test_failed_transaction_leaves_nothing(database: Database, outbox: Outbox) -> None:

    def fail() -> None:
        with database.transaction():
            put(outbox, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert outbox.depth() == 0
    assert put(outbox, 1)


def test_many_threads_share_one_database(outbox: Outbox) -> None:
    failures: list[BaseException] = []

    def work(start: int) -> None:
        try:
            for number in range(start, start + 25):
                put(outbox, number)
                outbox.end(named(number), "stored", transfer=seal(outbox, number))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 400, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert outbox.totals()["stored"] == 100
    assert outbox.depth() == 0


def test_quarantine_keeps_to_its_cap(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine", max_bytes=1000)
    for number in range(10):
        quarantine.keep(f"row/{number}", bytes([number]) * 300, "why")
    quarantine.keep("huge", bytes(5000), "too large to keep")
    kept = sorted((tmp_path / "quarantine").iterdir())
    assert sum(path.stat().st_size for path in kept) <= 1000
    assert any(path.read_bytes() == bytes([9]) * 300 for path in kept)
    assert all("/" not in path.name for path in kept)
    assert (quarantine.kept_total, [path.name for path in kept if "huge" in path.name]) == (
        11,
        ["00000011-huge.reason"],
    )


def test_quarantine_takes_a_folder_away(tmp_path: Path) -> None:
    (tmp_path / "slot").mkdir()
    (tmp_path / "slot" / "file").write_bytes(b"x")
    Quarantine(tmp_path / "quarantine").take(tmp_path / "slot", "damaged")
    assert not (tmp_path / "slot").exists()
    assert (tmp_path / "quarantine" / "00000001-slot" / "file").read_bytes() == b"x"
    Quarantine(None).take(tmp_path / "quarantine", "no disk to keep it on")
    assert not (tmp_path / "quarantine").exists()


class OutboxLedger(RuleBasedStateMachine):
    """An independent ledger of every id: open, or in exactly one terminal state."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox(open_database(MEMORY), max_bytes=4000)
        self.ids: dict[int, bytes] = {}
        self.ended: dict[int, str] = {}
        self.now = 0.0

    @rule(number=st.integers(0, 30), size=st.integers(0, 1500), wait=st.floats(0, 50))
    def put(self, number: int, size: int, wait: float) -> None:
        added = put(self.outbox, number, bytes(size), now=self.now, deadline=self.now + wait)
        assert added == (number not in self.ids)
        self.ids.setdefault(number, b"")

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), salt=st.binary(max_size=4))
    def seal(self, data: st.DataObject, salt: bytes) -> None:
        number = data.draw(st.sampled_from(sorted(self.ids)))
        if self.outbox.find(named(number)) is not None:
            self.ids[number] = seal(self.outbox, number, salt)

    @precondition(lambda self: self.ids)
    @rule(
        data=st.data(), verdict=st.sampled_from(["stored", "duplicate", "refused"]), is_forged=st.booleans()
    )
    def receipt(self, data: st.DataObject, verdict: str, is_forged: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.ids)))
        was_open = self.outbox.find(named(number)) is not None
        transfer = bytes(32) if is_forged else self.ids[number]
        ended = self.outbox.end(named(number), verdict, transfer=transfer)
        assert ended == (was_open and not is_forged and bool(self.ids[number]))

    @rule(wait=st.floats(0, 30))
    def time_goes_by(self, wait: float) -> None:
        self.now += wait
        self.outbox.expire(self.now)

    @invariant()
    def every_id_is_open_or_ended_once(self) -> None:
        states = {number: self.outbox.ended(named(number)) for number in self.ids}
        is_open = {row.update_id for row in self.outbox.pending()}
        for number, ended in states.items():
            assert (named(number) in is_open) == (ended is None)
            if number in self.ended:
                assert ended is not None
                assert ended[0] == self.ended[number]
            if ended is not None:
                self.ended[number] = ended[0]
        totals = self.outbox.totals()
        assert sum(totals.values()) == len(self.ended)
        for state in END_STATES:
            assert totals[state] == sum(kept == state for kept in self.ended.values())


TestOutboxLedger = OutboxLedger.TestCase
TestOutboxLedger.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
