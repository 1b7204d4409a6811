"""A queue that has an end: in items and in bytes, for what comes from outside."""

from __future__ import annotations

import queue
import threading

import pytest

from process.bounded_queue import BoundedQueue


def test_what_does_not_fit_is_dropped_and_counted_and_own_items_always_fit() -> None:
    waiting: BoundedQueue[bytes] = BoundedQueue(3, 1_000, len)
    assert [waiting.offer(b"a") for _ in range(5)] == [True] * 3 + [False] * 2
    waiting.put(b"own")
    assert (waiting.qsize(), waiting.waiting_bytes, waiting.dropped_total) == (4, 3, 2)
    assert [waiting.get(0) for _ in range(4)] == [b"a", b"a", b"a", b"own"]
    with pytest.raises(queue.Empty):
        waiting.get(0)
    assert waiting.waiting_bytes == 0


def test_bytes_are_bounded_and_one_large_item_passes_alone() -> None:
    waiting: BoundedQueue[bytes] = BoundedQueue(100, 1_000, len)
    assert waiting.offer(bytes(5_000)), "nothing else waits"
    assert not waiting.offer(b"x")
    waiting.get(0)
    assert waiting.offer(bytes(600))
    assert not waiting.offer(bytes(600))
    assert waiting.offer(bytes(400))


def test_nothing_is_lost_or_doubled_between_threads() -> None:
    waiting: BoundedQueue[bytes] = BoundedQueue(10_000, 2_000, len)
    taken: list[bytes] = []
    offered = [[f"{name}{number}".encode() for number in range(2_000)] for name in "abc"]
    fitted: list[bytes] = []
    lock = threading.Lock()

    def offer(items: list[bytes]) -> None:
        for item in items:
            if waiting.offer(item):
                with lock:
                    fitted.append(item)

    threads = [threading.Thread(target=offer, args=(items,)) for items in offered]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or waiting.qsize():
        try:
            taken.append(waiting.get(0.01))
        except queue.Empty:
            continue
    assert sorted(taken) == sorted(fitted)
    assert len(fitted) + waiting.dropped_total == 6_000
    assert waiting.waiting_bytes == 0
