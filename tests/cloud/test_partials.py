"""Chunks of large updates outlive the aggregator: bounded, verified, and never asked for twice without need."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from cloud_server.inbox import Inbox
from cloud_server.partials import FROM_CHUNKS, Partials
from fleet.virtual import VirtualTime
from tests.cloud.test_inbox import KEM, KEY, SLOT, TOPICS, Heard, sealed
from wire.chunks import Chunk, parse, split
from wire.envelope import Signer
from wire.messages import Update
from wire.primitives import sha256
from wire.transport import Packet

UPDATE = Update(
    update_id=b"u" * 16,
    order_id=b"o" * 16,
    run="main",
    round_number=1,
    base_sha256=bytes(32),
    num_examples=1,
    codec="fp32",
    params_size=4,
    payload=random.Random(5).randbytes(9_000),
)
MESSAGE = sealed(UPDATE, 7)
CHUNKS = split(MESSAGE, 1_000)
TRANSFER = sha256(MESSAGE)


class Life:
    """One life of an aggregator's inbox on a folder."""

    def __init__(self, folder: Path, clock: VirtualTime | None = None, **bounds: float) -> None:
        self.heard = Heard()
        self.partials = Partials(folder, clock or VirtualTime(), **bounds)  # type: ignore[arg-type]
        self.inbox = Inbox(
            topics=TOPICS,
            signers=lambda: {KEY.key_id: Signer("dev", KEY.verify_key)},
            is_known=lambda device: device == "dev",
            kem_keys={KEM.key_id: KEM},
            receiver=self.heard,
            clock=VirtualTime(),
            slot_bytes=SLOT,
        )
        self.inbox.keep_partials(self.partials)

    def hear(self, *indices: int, chunks: list[bytes] = CHUNKS) -> None:
        for index in indices:
            self.inbox.receive(Packet(TOPICS.upload("0", "dev", 1, index), chunks[index]))

    @property
    def missing(self) -> tuple[int, ...]:
        """What it asked for last."""
        kind, _, missing = self.heard.calls[-1]
        assert kind == "missing"
        return tuple(missing)

    @property
    def updates(self) -> int:
        return sum(kind == "update" for kind, _, _ in self.heard.calls)


LAST = len(CHUNKS) - 1


def test_restarted_aggregator_asks_for_what_it_never_had(tmp_path: Path) -> None:
    Life(tmp_path).hear(0, 2, 5)  # and is killed
    again = Life(tmp_path)
    again.hear(LAST)
    assert again.missing == tuple(i for i in range(LAST) if i not in (0, 2, 5))
    again.hear(*again.missing)
    assert again.updates == 1
    assert again.heard.calls[-1][0] == "update"
    assert list(tmp_path.iterdir()) == [], "what is whole is in the books"


def test_restart_after_every_chunk_loses_none(tmp_path: Path) -> None:
    for index in range(LAST):
        Life(tmp_path).hear(index)
    last = Life(tmp_path)
    last.hear(LAST)
    assert last.updates == 1


@pytest.mark.parametrize("step", [1, 2, 3])
def test_file_that_was_cut_at_any_byte_brings_only_whole_chunks(tmp_path: Path, step: int) -> None:
    Life(tmp_path).hear(0, 1, 2)
    (place,) = tmp_path.iterdir()
    whole = place.read_bytes()
    for cut in range(step, len(whole), 37):
        place.write_bytes(whole[:cut])
        found = list(Partials(tmp_path, VirtualTime()).restore("dev", TRANSFER))
        assert [chunk.index for chunk in found] == list(range(len(found)))
        assert all(chunk == parse(CHUNKS[chunk.index]) for chunk in found)
        assert len(found) <= 2 + (cut == len(whole))


@pytest.mark.parametrize("seed", range(10))
def test_flipped_byte_costs_bytes_and_never_an_update(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    Life(tmp_path).hear(*range(LAST))
    (place,) = tmp_path.iterdir()
    data = bytearray(place.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    place.write_bytes(data)
    again = Life(tmp_path)
    again.hear(LAST)
    for _ in range(3):  # what is wrong in the head is noticed when the whole does not have its hash
        if again.updates:
            break
        again.hear(*range(len(CHUNKS)))
    assert again.updates == 1


def test_transfer_that_is_cut_otherwise_after_a_restart_starts_over(tmp_path: Path) -> None:
    Life(tmp_path).hear(0, 1, 2, 3)
    other = split(MESSAGE, 700)
    again = Life(tmp_path)
    again.hear(*range(len(other)), chunks=other)
    assert again.updates == 1


def test_files_are_bounded_in_bytes_and_age(tmp_path: Path) -> None:
    clock = VirtualTime()
    life = Life(tmp_path, clock, limit_bytes=20_000, max_age_seconds=3600.0)
    rng = random.Random(1)
    for number in range(30):
        piece = rng.randbytes(3_000)
        life.partials.keep("dev", Chunk(number.to_bytes(32, "big"), 0, 10, 30_000, 3_000, piece))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) == life.partials.kept_bytes <= 20_000
    assert len(list(tmp_path.iterdir())) == 6
    for path in tmp_path.iterdir():
        os.utime(path, (clock.now() - 4000, clock.now() - 4000))
    life.partials.sweep()
    assert list(tmp_path.iterdir()) == []
    assert life.partials.kept_bytes == 0


def test_small_transfers_and_a_full_disk_cost_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    life = Life(tmp_path / "parts")
    small = split(MESSAGE, 1 + len(MESSAGE) // (FROM_CHUNKS - 1) + 52)
    assert len(small) < FROM_CHUNKS
    life.hear(0, chunks=small)
    assert list((tmp_path / "parts").iterdir()) == []
    (tmp_path / "file").touch()
    blocked = Life(tmp_path / "file" / "parts")
    blocked.hear(*range(len(CHUNKS)))
    assert blocked.updates == 1
    assert caplog.text.count("partial_updates_not_kept") <= 2
