"""Data at rest: nothing of a sample or an update lies on the disk in the clear, and a destroyed key ends every copy."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.lock import lock_state
from edge_agent.store.at_rest import ROTATE_SECONDS, Vault, open_vault
from edge_agent.store.forget import forget
from edge_agent.store.key_store import FileKeyStore, KeyStore, MemoryKeyStore
from edge_agent.store.outbox import Outbox
from edge_agent.store.samples import SampleStore
from edge_agent.store.storage import Database, open_database
from tests.edge.lab import Lab
from tests.edge.tiny_release import SteppedClock
from wire.errors import ConfigurationError, StorageError
from wire.primitives import CONTENT_ALGORITHMS, NONCE_BYTES, ContentAlgorithm

LATER = 1e9
SECRET = b"what the sensor saw on Tuesday! " * 16
WINDOW = np.frombuffer(SECRET, "<f4").reshape(8, -1)


def put(outbox: Outbox, number: int, body: bytes = SECRET, now: float = 0.0) -> None:
    name = number.to_bytes(16, "big")
    assert outbox.put(name, name, "run", 1, "up", body, now, LATER)


def fill(database: Database) -> None:
    """Every store has the secret: two samples, an update, and an entry of the quarantine."""
    store = SampleStore(database)
    store.add(WINDOW, 3, 0.0)
    store.label(store.add(WINDOW, None, 0.0), 4)
    put(Outbox(database), 1)
    database.set_secret_fact("left_over", SECRET)
    database.quarantine.keep("row", SECRET, "damaged")


def files_with(folder: Path, wanted: bytes) -> list[str]:
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and wanted in path.read_bytes()
    ]


def stored(database: Database) -> tuple[int, list[bytes]]:
    """What can be read: samples, and bodies of updates."""
    return len(SampleStore(database).windows("train")[1]), [row.body for row in Outbox(database).pending()]


def test_nothing_of_a_sample_or_an_update_lies_on_the_disk_in_the_clear(tmp_path: Path) -> None:
    database = open_database(tmp_path, clock=SteppedClock())
    fill(database)
    assert (tmp_path / "agent.db-wal").stat().st_size > 0
    for piece in (SECRET[:32], SECRET[8:24], SECRET[-16:]):
        assert files_with(tmp_path, piece) == []
    database.erase_leftovers()
    database.close()
    assert files_with(tmp_path, SECRET[:16]) == []
    again = open_database(tmp_path, clock=SteppedClock())
    assert stored(again) == (2, [SECRET])
    assert SampleStore(again).labelled("train")[1].tolist() == [3, 4]
    assert again.secret_fact("left_over") == SECRET
    ((name, _, _),) = again.quarantine.entries()
    assert again.quarantine.read(name) == SECRET


@pytest.mark.parametrize("what", ["samples", "everything"])
def test_forgetting_makes_a_copy_of_the_files_unreadable(tmp_path: Path, what: str) -> None:
    """Whoever copied all but the wrapping key, and has the device afterwards, reads nothing."""
    folder, copy = tmp_path / "device", tmp_path / "copy"
    database = open_database(folder, clock=SteppedClock())
    fill(database)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.key"))
    database.close()
    forgotten = forget(folder, what, SteppedClock(9.0))  # type: ignore[arg-type]
    assert (forgotten.samples, forgotten.updates) == (2, int(what == "everything"))
    for key in (folder / "at_rest").glob("*.key"):
        shutil.copy(key, copy / "at_rest")
    thief = open_database(copy, clock=SteppedClock())
    samples, bodies = stored(thief)
    assert samples == 0
    assert bodies == []
    assert all(SECRET[:16] not in thief.quarantine.read(name) for name in readable(thief))
    assert thief.secret_fact("left_over") is None
    assert files_with(copy, SECRET[:16]) == []


def readable(database: Database) -> Iterator[str]:
    for name, _, _ in database.quarantine.entries():
        try:
            database.quarantine.read(name)
        except StorageError:
            continue
        yield name


def test_device_goes_on_after_it_forgot_its_samples_and_still_owes_its_updates(tmp_path: Path) -> None:
    database = open_database(tmp_path, clock=SteppedClock())
    fill(database)
    last = SampleStore(database).add(WINDOW, 1, 0.0)
    database.close()
    forget(tmp_path, "samples", SteppedClock())
    again = open_database(tmp_path, clock=SteppedClock())
    assert stored(again) == (0, [SECRET])
    store = SampleStore(again)
    assert store.was_forgotten(last)
    assert store.add(WINDOW, 1, 0.0) == last + 1
    assert store.damaged_total == 0
    assert again.quarantine.entries() == []


def test_running_agent_forgets_its_samples_in_every_copy(lab: Lab, tmp_path: Path) -> None:
    folder, copy = tmp_path / "device", tmp_path / "copy"
    agent = lab.agent(database=open_database(folder, clock=lab.time))
    lab.run(2)
    window = np.linspace(0, 1, 12, dtype=np.float32)
    for label in range(3):
        agent.observe(window, label)
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "at_rest")
    assert agent.forget_samples() == 3
    assert agent.forget_samples() == 0
    shutil.copytree(folder / "at_rest", copy / "at_rest")
    assert stored(open_database(copy, clock=lab.time))[0] == 0
    agent.observe(window, 1)
    assert agent.parts.samples.counts()["samples"] == 1
    assert agent.infer(window).release_version == 1


def test_everything_that_was_owed_is_counted_when_it_is_forgotten(tmp_path: Path) -> None:
    database = open_database(tmp_path, clock=SteppedClock())
    fill(database)
    database.close()
    forget(tmp_path, "everything", SteppedClock())
    assert list((tmp_path / "at_rest").iterdir()) == []
    outbox = Outbox(open_database(tmp_path, clock=SteppedClock()))
    assert outbox.totals()["destroyed"] == 1
    assert outbox.ended((1).to_bytes(16, "big")) == ("destroyed", "forgotten on demand")
    put(outbox, 2)
    assert [row.body for row in outbox.pending()] == [SECRET]


def test_folder_that_an_agent_uses_is_not_forgotten_under_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nothing to forget"):
        forget(tmp_path, "samples", SteppedClock())
    database = open_database(tmp_path, clock=SteppedClock())
    fill(database)
    lock = lock_state(tmp_path)
    with pytest.raises(ConfigurationError, match="another agent"):
        forget(tmp_path, "samples", SteppedClock())
    os.close(lock)
    assert stored(database) == (2, [SECRET])


def test_forgotten_sample_is_unreadable_in_a_copy_and_its_day_goes_on(tmp_path: Path) -> None:
    folder, copy = tmp_path / "device", tmp_path / "copy"
    store = SampleStore(open_database(folder, clock=SteppedClock()))
    ids = [store.add(WINDOW + number, number, 0.0) for number in range(3)]
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "at_rest")
    assert store.forget(ids[1])
    shutil.copytree(folder / "at_rest", copy / "at_rest")
    x, y = store.labelled("train")
    assert y.tolist() == [0, 2]
    np.testing.assert_array_equal(x, np.stack([WINDOW, WINDOW + 2]))
    assert len(SampleStore(open_database(copy, clock=SteppedClock())).windows("train")[1]) == 0
    assert store.add(WINDOW, 5, 0.0) == ids[-1] + 1
    assert len(store._database.vault.key_ids("samples")) == 1


def test_key_of_a_day_goes_with_its_last_sample(tmp_path: Path) -> None:
    clock = SteppedClock(0.0)
    folder, copy = tmp_path / "device", tmp_path / "copy"
    database = open_database(folder, clock=clock)
    store = SampleStore(database)
    for day in range(3):
        clock.seconds = day * ROTATE_SECONDS
        store.add(WINDOW + day, day, clock.seconds)
    first, *others = database.vault.key_ids("samples")
    assert len(others) == 2
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "at_rest")
    store = SampleStore(database, retention_seconds=1.5 * ROTATE_SECONDS)
    assert store.expire(clock.seconds) == 1
    assert store.retire_keys() == 1
    assert store.retire_keys() == 0
    assert database.vault.key_ids("samples") == tuple(others)
    assert first not in database.vault.key_ids("samples")
    assert store.labelled("train")[1].tolist() == [1, 2]
    shutil.copytree(folder / "at_rest", copy / "at_rest")
    older = SampleStore(open_database(copy, clock=clock))
    assert older.windows("train")[1].tolist() == [1, 2]


def test_outbox_key_of_a_past_day_goes_when_nothing_is_owed_under_it(tmp_path: Path) -> None:
    clock = SteppedClock(0.0)
    database = open_database(tmp_path, clock=clock)
    outbox = Outbox(database)
    put(outbox, 1)
    (first,) = database.vault.key_ids("outbox")
    clock.seconds = ROTATE_SECONDS
    assert outbox.retire_keys() == 0
    put(outbox, 2)
    assert outbox.end((1).to_bytes(16, "big"), "expired")
    assert outbox.retire_keys() == 1
    assert first not in database.vault.key_ids("outbox")
    assert [row.body for row in outbox.pending()] == [SECRET]


def test_clock_that_is_set_back_makes_one_key_and_not_one_for_every_row(tmp_path: Path) -> None:
    clock = SteppedClock(1e9)
    database = open_database(tmp_path, clock=clock)
    store = SampleStore(database)
    store.add(WINDOW, 1, clock.seconds)
    clock.seconds = 0.0
    for _ in range(5):
        store.add(WINDOW, 1, clock.seconds)
    assert len(database.vault.key_ids("samples")) == 2
    assert len(store.windows("train")[1]) == 6


# --- nonces, and what a row is bound to -------------------------------------------------------------------


def nonces(folder: Path) -> list[bytes]:
    with sqlite3.connect(folder / "agent.db") as connection:
        sql = "SELECT window FROM samples UNION ALL SELECT body FROM outbox"
        return [row[0][:NONCE_BYTES] for row in connection.execute(sql)]


def test_no_nonce_comes_twice_across_restarts_and_a_restored_copy(tmp_path: Path) -> None:
    """The same rows, under the same keys, in two copies of one disk that both go on, and after restarts."""
    first, second = tmp_path / "first", tmp_path / "second"
    database = open_database(first, clock=SteppedClock())
    fill(database)
    database.close()
    shutil.copytree(first, second)
    shared = set(nonces(first))
    for folder, start in itertools.product((first, second), range(3)):
        database = open_database(folder, clock=SteppedClock())
        store = SampleStore(database)
        for number in range(20):
            store.add(WINDOW, number, 0.0)
            put(Outbox(database), 100 + 20 * start + number)
        database.close()
    keys = [
        set(open_database(folder, clock=SteppedClock()).vault.key_ids("samples"))
        for folder in (first, second)
    ]
    assert keys[0] == keys[1]
    made = [set(nonces(folder)) - shared for folder in (first, second)]
    assert len(made[0] | made[1]) == 2 * 2 * 3 * 20


def test_label_that_is_corrected_is_sealed_under_another_nonce(tmp_path: Path) -> None:
    store = SampleStore(open_database(tmp_path, clock=SteppedClock()))
    sample = store.add(WINDOW, 1, 0.0)
    before = nonces(tmp_path)
    store.label(sample, 2)
    assert set(before).isdisjoint(nonces(tmp_path))


@pytest.mark.parametrize(
    ("store", "other"), [("samples", "outbox"), ("outbox", "samples"), ("samples", "quarantine")]
)
def test_sealed_bytes_open_in_their_store_and_place_only(store: str, other: str) -> None:
    vault = open_vault(None, SteppedClock())
    key, sealed = vault.seal(store, b"row 1", SECRET)  # type: ignore[arg-type]
    assert vault.open(store, key, b"row 1", sealed) == SECRET  # type: ignore[arg-type]
    other_key, _ = vault.seal(other, b"row 1", SECRET)  # type: ignore[arg-type]
    for arguments in (
        (store, key, b"row 2", sealed),
        (other, key, b"row 1", sealed),
        (other, other_key, b"row 1", sealed),
        (store, key, b"row 1", sealed[:-1]),
        (store, key, b"row 1", sealed[:20]),
        (store, "00000000", b"row 1", sealed),
    ):
        with pytest.raises(StorageError):
            vault.open(*arguments)  # type: ignore[arg-type]


def test_row_that_is_moved_to_another_place_is_found_though_its_digest_is_made_anew(tmp_path: Path) -> None:
    """Who may write the file can make any digest, and no seal."""
    from edge_agent.store.sealed_rows import row_digest, update_place

    database = open_database(tmp_path, clock=SteppedClock())
    outbox = Outbox(database)
    for number in (1, 2):
        put(outbox, number, b"update of order %d" % number)
    names = [number.to_bytes(16, "big") for number in (1, 2)]
    ((key, sealed),) = database.read(
        "SELECT at_rest_key_id, body FROM outbox WHERE update_id = ?", (names[0],)
    )
    place = update_place(names[1], names[1], "run", 1, "up", 0.0, LATER)
    with database.transaction() as connection:
        connection.execute(
            "UPDATE outbox SET body = ?, sha256 = ? WHERE update_id = ?",
            (sealed, row_digest(place, key, sealed), names[1]),
        )
    assert [row.update_id for row in outbox.pending()] == names[:1]
    assert outbox.totals()["destroyed"] == 1


@pytest.mark.parametrize("algorithm", CONTENT_ALGORITHMS)
def test_rows_of_either_algorithm_open_on_a_machine_that_is_faster_with_the_other(
    tmp_path: Path, algorithm: ContentAlgorithm
) -> None:
    ring = tmp_path / "at_rest" / "ring"
    vault = Vault(FileKeyStore(ring.parent), ring, SteppedClock(), lambda: algorithm)
    key, sealed = vault.seal("samples", b"", SECRET)
    other = next(name for name in CONTENT_ALGORITHMS if name != algorithm)
    again = Vault(FileKeyStore(ring.parent), ring, SteppedClock(), lambda: other)
    assert again.open("samples", key, b"", sealed) == SECRET


# --- keys that are lost -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["wrapping key", "damaged wrapping key", "ring", "damaged ring", "all"])
def test_lost_keys_cost_the_stores_and_not_the_device(tmp_path: Path, loss: str) -> None:
    database = open_database(tmp_path, clock=SteppedClock())
    fill(database)
    database.set_fact("time_floor", 5.0)
    epoch = database.epoch
    database.close()
    at_rest = tmp_path / "at_rest"
    (key,) = at_rest.glob("*.key")
    match loss:
        case "wrapping key":
            key.unlink()
        case "damaged wrapping key":
            key.write_bytes(bytes(32))
        case "ring":
            (at_rest / "ring").unlink()
        case "damaged ring":
            (at_rest / "ring").write_bytes(b"\xff{" * 50)
        case "all":
            shutil.rmtree(at_rest)
    again = open_database(tmp_path, clock=SteppedClock())
    outbox, store = Outbox(again), SampleStore(again)
    assert outbox.pending() == []
    assert outbox.totals()["destroyed"] == 1
    assert outbox.ended((1).to_bytes(16, "big")) == ("destroyed", "its key is lost or was destroyed")
    assert [reason for _, _, reason in again.quarantine.entries()][1:] == [
        "outbox row: its key is lost or was destroyed"
    ]
    assert store.counts()["samples"] == 0
    assert store.damaged_total == 2
    assert (again.fact("time_floor"), again.epoch) == (5.0, epoch)
    put(outbox, 2)
    store.add(WINDOW, 1, 0.0)
    again.close()
    assert stored(open_database(tmp_path, clock=SteppedClock())) == (1, [SECRET])


def test_one_damaged_line_of_the_ring_costs_its_key_only(tmp_path: Path) -> None:
    database = open_database(tmp_path, clock=SteppedClock())
    fill(database)
    database.close()
    ring = tmp_path / "at_rest" / "ring"
    lines = ring.read_bytes().splitlines(keepends=True)
    damaged = [
        line.replace(b'"wrapped":"', b'"wrapped":"0') if b'"samples"' in line else line for line in lines
    ]
    ring.write_bytes(b"".join(damaged))
    again = open_database(tmp_path, clock=SteppedClock())
    assert "does not open" in again.vault.damage
    assert stored(again) == (0, [SECRET])


def test_ring_that_cannot_be_read_now_is_an_error_and_destroys_nothing(tmp_path: Path) -> None:
    database = open_database(tmp_path, clock=SteppedClock())
    fill(database)
    database.close()
    ring = tmp_path / "at_rest" / "ring"
    ring.rename(tmp_path / "elsewhere")
    ring.mkdir()
    with pytest.raises(StorageError):
        open_vault(tmp_path, SteppedClock())
    ring.rmdir()
    (tmp_path / "elsewhere").rename(ring)
    assert stored(open_database(tmp_path, clock=SteppedClock())) == (2, [SECRET])


class _StopsBefore:
    """A key store that ends the process, as it were, at one of its operations."""

    def __init__(self, inner: KeyStore, operation: str) -> None:
        self._inner = inner
        self._operation = operation

    def __getattr__(self, name: str) -> object:
        if name == self._operation:
            raise InterruptedError(name)
        return getattr(self._inner, name)


@pytest.mark.parametrize("operation", ["make", "unwrap", "wrap", "destroy"])
def test_destruction_that_is_cut_off_leaves_keys_that_open_or_are_gone(
    tmp_path: Path, operation: str
) -> None:
    ring = tmp_path / "ring"
    vault = Vault(FileKeyStore(tmp_path), ring, SteppedClock())
    kept, sealed = vault.seal("outbox", b"", SECRET)
    gone, _ = vault.seal("samples", b"", SECRET)
    vault._keys = _StopsBefore(vault._keys, operation)  # type: ignore[assignment]
    with pytest.raises(InterruptedError):
        vault.destroy([gone])
    again = Vault(FileKeyStore(tmp_path), ring, SteppedClock())
    assert again.open("outbox", kept, b"", sealed) == SECRET
    assert again.knows(gone) == (operation != "destroy")
    assert len(list(tmp_path.glob("*.key"))) == 1
    assert again.damage == ""


def test_older_copy_of_the_ring_is_worth_nothing_after_a_key_was_destroyed(tmp_path: Path) -> None:
    ring = tmp_path / "ring"
    vault = Vault(FileKeyStore(tmp_path), ring, SteppedClock())
    gone, sealed = vault.seal("samples", b"", SECRET)
    kept, other = vault.seal("outbox", b"", SECRET)
    copy = ring.read_bytes()
    vault.destroy([gone])
    assert vault.open("outbox", kept, b"", other) == SECRET
    ring.write_bytes(copy)
    thief = Vault(FileKeyStore(tmp_path), ring, SteppedClock())
    with pytest.raises(StorageError):
        thief.open("samples", gone, b"", sealed)


def test_all_is_forgotten_on_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overwriting keys needs no new blocks; here every new file is refused."""
    vault = open_vault(tmp_path, SteppedClock())
    key, _ = vault.seal("samples", b"", SECRET)
    (tmp_path / "at_rest").chmod(0o700)
    real = os.open

    def no_room(path: str, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(28, "No space left on device")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", no_room)
    with pytest.raises(StorageError):
        vault.destroy([key])
    vault.forget()
    assert list((tmp_path / "at_rest").iterdir()) == []


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_key_store_keeps_its_contract(tmp_path: Path, kind: str) -> None:
    """What an implementation for a TPM or a token has to do, too."""

    def opened() -> KeyStore:
        return FileKeyStore(tmp_path / "keys")

    keys: KeyStore = MemoryKeyStore() if kind == "memory" else opened()
    first, second = keys.make(), keys.make()
    assert keys.names() == {first, second}
    wrapped = keys.wrap(first, SECRET[:32], b"context")
    assert keys.wrap(first, SECRET[:32], b"context") != wrapped
    if kind == "files":
        keys = opened()
    assert keys.unwrap(first, wrapped, b"context") == SECRET[:32]
    for name, data, context in (
        (second, wrapped, b"context"),
        (first, wrapped, b"other"),
        (first, b"", b"context"),
    ):
        with pytest.raises(StorageError):
            keys.unwrap(name, data, context)
    keys.destroy(first)
    keys.destroy(first)
    assert keys.names() == {second}
    with pytest.raises(StorageError):
        keys.unwrap(first, wrapped, b"context")
