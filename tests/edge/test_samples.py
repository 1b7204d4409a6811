"""The sample store: bounded, forgettable, read fast and never wrongly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_agent.store.samples import ROW_BYTES, UNLABELLED, SampleStore
from edge_agent.store.storage import MEMORY, Database, open_database
from wire.errors import DataError, StorageError


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_database(tmp_path)


@pytest.fixture
def store(database: Database) -> SampleStore:
    return SampleStore(database)


def window(value: float, shape: tuple[int, ...] = (2, 3)) -> np.ndarray:
    return np.full(shape, value, np.float32)


def test_labelled_windows_come_back_in_order(tmp_path: Path, database: Database, store: SampleStore) -> None:
    rng = np.random.default_rng(1)
    windows = rng.normal(size=(20, 6, 10)).astype(np.float32)
    for number, one in enumerate(windows):
        store.add(one, number % 7, float(number), "val" if number % 4 == 0 else "train")
    database.close()
    store = SampleStore(open_database(tmp_path))
    x, y = store.labelled("train")
    kept = [number for number in range(20) if number % 4]
    assert x.dtype == np.float32
    assert y.dtype == np.int64
    np.testing.assert_array_equal(x, windows[kept])
    assert y.tolist() == [number % 7 for number in kept]
    assert len(store.labelled("val")[0]) == 5
    x[0] = 0


def test_label_comes_later_and_can_be_corrected(store: SampleStore) -> None:
    sample = store.add(window(1), None, 0.0)
    assert store.counts() == {"samples": 1, "labelled": 0, "train": 0, "val": 0, "bytes": 24}
    assert len(store.labelled("train")[1]) == 0
    assert store.windows("train")[1].tolist() == [UNLABELLED]
    assert store.label(sample, 3)
    assert store.labelled("train")[1].tolist() == [3]
    assert store.label(sample, 0)
    assert store.windows("train")[1].tolist() == [0]
    assert store.counts()["labelled"] == 1
    assert not store.label(sample + 1, 2)


def test_no_samples_give_empty_arrays(store: SampleStore) -> None:
    x, y = store.labelled("train", shape=(6, 100))
    assert (x.shape, y.shape) == ((0, 6, 100), (0,))
    assert store.labelled("val")[1].shape == (0,)


def test_forgotten_sample_leaves_a_tombstone_and_no_bytes(
    tmp_path: Path, database: Database, store: SampleStore
) -> None:
    secret = np.frombuffer(b"a window that must be gone from the disk" * 20, "<f4")
    sample = store.add(secret, 1, 0.0)
    other = store.add(window(2, secret.shape), 1, 0.0)
    assert store.forget(sample, 5.0)
    assert not store.forget(sample)
    assert store.was_forgotten(sample)
    assert not store.was_forgotten(other)
    assert store.add(secret * 2, 1, 0.0) > other
    assert len(store.labelled("train")[1]) == 2
    assert not store.label(sample, 2)
    for path in tmp_path.iterdir():
        if path.is_file():
            assert secret.tobytes()[:64] not in path.read_bytes(), path.name


@pytest.mark.parametrize("labels", [(1, 2, 3, 4), (None, None, None, None)])
def test_full_store_drops_the_oldest(database: Database, labels: tuple[int | None, ...]) -> None:
    store = SampleStore(database, max_bytes=3 * (24 + ROW_BYTES))
    for number, label in enumerate(labels):
        store.add(window(number), label, float(number))
    x, _ = store.windows("train")
    assert x[:, 0, 0].tolist() == [1.0, 2.0, 3.0]
    assert store.dropped_total == 1


def test_cap_holds_after_a_restart(tmp_path: Path, database: Database) -> None:
    cap = 100 * (2400 + ROW_BYTES)
    store = SampleStore(database, max_bytes=cap)
    for number in range(250):
        store.add(window(number, (6, 100)), 1, float(number))
    database.close()
    store = SampleStore(open_database(tmp_path), max_bytes=cap // 2)
    store.add(window(250, (6, 100)), 1, 250.0)
    x, _ = store.labelled("train")
    assert len(x) <= 50
    assert x[-1, 0, 0] == 250.0
    assert store.counts()["bytes"] <= cap // 2


def test_retention_drops_the_old(database: Database) -> None:
    store = SampleStore(database, retention_seconds=100.0)
    for now in (0.0, 50.0, 120.0):
        store.add(window(now), 1, now)
    assert store.labelled("train")[0][:, 0, 0].tolist() == [50.0, 120.0]
    assert store.expire(200.0) == 1
    assert store.expire(200.0) == 0
    assert store.counts()["samples"] == 1


def test_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    store = SampleStore(open_database(tmp_path, max_bytes=64 * 4096), max_bytes=10**9)

    def fill() -> None:
        for number in range(1000):
            store.add(window(number, (1000,)), 1, 0.0)

    with pytest.raises(StorageError) as caught:
        fill()
    assert caught.value.facts["full"]
    kept, _ = store.labelled("train")
    assert len(kept) > 10
    assert store.forget(1)
    store.add(window(0, (900,)), 1, 0.0)


@pytest.mark.parametrize(
    ("bad", "label"),
    [
        (np.array([np.nan], np.float32), 1),
        (np.array([np.inf], np.float32), 1),
        (np.zeros(0, np.float32), 1),
        (np.array(["text"]), 1),
        (np.zeros(1000, np.float32), 1),
        (np.zeros(1, np.float32), -1),
        (np.zeros(1, np.float32), 65_536),
        (np.zeros(1, np.float32), True),
    ],
)
def test_window_or_label_that_cannot_be_is_refused(database: Database, bad: np.ndarray, label: int) -> None:
    store = SampleStore(database, max_bytes=1000)
    with pytest.raises(DataError):
        store.add(bad, label, 0.0)
    assert store.counts()["samples"] == 0


def test_unknown_split_is_refused(store: SampleStore) -> None:
    with pytest.raises(DataError):
        store.add(window(1), 1, 0.0, "test")  # type: ignore[arg-type]


def test_windows_of_another_shape_are_left_out(store: SampleStore) -> None:
    store.add(window(1, (2,)), 1, 0.0)
    store.add(window(2, (3,)), 2, 0.0)
    assert store.labelled("train")[0].shape == (1, 3)
    assert store.labelled("train", shape=(2,))[1].tolist() == [1]
    assert store.labelled("train", shape=(9,))[0].shape == (0, 9)


def test_half_precision_takes_half_the_space(database: Database) -> None:
    store = SampleStore(database, precision="float16")
    value = np.linspace(-3, 3, 60, dtype=np.float32).reshape(6, 10)
    store.add(value, 1, 0.0)
    x, _ = store.labelled("train")
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x[0], value.astype(np.float16).astype(np.float32))
    assert store.counts()["bytes"] == 120
    with pytest.raises(DataError, match="beyond float16"):
        store.add(np.array([70000.0], np.float32), 1, 0.0)
    SampleStore(database).add(value, 2, 0.0)
    both, labels = store.labelled("train")
    assert labels.tolist() == [1, 2]
    np.testing.assert_array_equal(both[1], value)


@pytest.mark.parametrize(
    "damage", ["labelled = 0", "split = 'val'", "window = zeroblob(24)", "window = 3", "dtype = 'x'"]
)
def test_damaged_row_is_dropped_and_counted(database: Database, store: SampleStore, damage: str) -> None:
    for value in (1, 2, 3):
        store.add(window(value), value, 0.0)
    with database.transaction() as connection:
        connection.execute(f"UPDATE samples SET {damage} WHERE id = 2")
    found = store.labelled("train")[1].tolist() + store.labelled("val")[1].tolist()
    assert found == [1, 3]
    store.windows("train")
    assert store.damaged_total == 1
    assert store.counts()["samples"] == 2


def test_ids_are_never_used_twice(store: SampleStore) -> None:
    first = [store.add(window(1), 1, 0.0) for _ in range(3)]
    for sample in first:
        store.forget(sample)
    assert store.add(window(1), 1, 0.0) == first[-1] + 1


def test_store_in_memory_needs_no_disk() -> None:
    store = SampleStore(open_database(MEMORY))
    sample = store.add(window(1), 1, 0.0)
    assert store.forget(sample)
    assert store.counts()["samples"] == 0
