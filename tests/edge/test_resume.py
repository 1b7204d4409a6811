"""What a restart in the middle of a transfer costs: heads and releases on the way down, updates on the way up."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from edge_agent.release.memory_slots import MemorySlots
from edge_agent.rounds.heads import Heads
from edge_agent.rounds.kept_heads import FROM_BYTES, MAX_AGE_SECONDS, MAX_FILES, FolderChunks
from edge_agent.store.storage import MEMORY, open_database
from edge_agent.uplink.speaker import ASKED_FROM_CHUNKS
from models.bundle import Bundle
from process.clock import SystemClock
from tests.edge.lab import LIMIT, Lab, VirtualTime, feed
from wire.blobs import make_ref
from wire.chunks import Chunk, Reassembly, parse
from wire.messages import Receipt, TrainConfig, Update

HEAD = random.Random(3).randbytes(400_000)
REF, CHUNKS = make_ref(HEAD, 98_304)
MOST = 64 * 2**20


def kept(folder: Path, clock: VirtualTime | None = None, *, max_bytes: int = MOST) -> FolderChunks:
    return FolderChunks(folder, clock or SystemClock(), max_bytes=max_bytes)


def heads(folder: Path) -> Heads:
    return Heads(MOST, kept=kept(folder))


# ---- heads -----------------------------------------------------------------------------------------------------


def test_restart_asks_for_what_is_missing_of_a_head_only(tmp_path: Path) -> None:
    first = heads(tmp_path)
    assert not first.gather(REF)
    for index in (0, 3):
        assert first.add(REF.sha256, index, CHUNKS[index])
    again = heads(tmp_path)  # the process was killed
    assert not again.gather(REF)
    need = again.need(REF.sha256)
    assert need is not None
    assert need.bitmap == bytes([0b10110])
    for index in (1, 2, 4):
        found = again.add(REF.sha256, index, CHUNKS[index])
    assert found is not None
    assert found.is_complete
    assert again.read(REF.sha256) == HEAD


def test_complete_head_is_here_after_a_restart_and_gone_when_it_is_dropped(tmp_path: Path) -> None:
    first = heads(tmp_path)
    first.gather(REF)
    for index, chunk in enumerate(CHUNKS):
        first.add(REF.sha256, index, chunk)
    again = heads(tmp_path)
    assert again.gather(REF)
    assert again.read(REF.sha256) == HEAD
    again.drop(REF.sha256)
    assert list(tmp_path.iterdir()) == []
    assert not heads(tmp_path).gather(REF)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_a_crash_left_of_the_file_no_wrong_byte_is_used(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    first = heads(tmp_path)
    first.gather(REF)
    for index in range(4):
        first.add(REF.sha256, index, CHUNKS[index])
    (place,) = tmp_path.iterdir()
    data = bytearray(place.read_bytes())
    cut = rng.randrange(len(data))
    if seed % 2:
        data = data[:cut]  # a torn end
    else:
        data[cut : cut + 4096] = bytes(4096)  # a hole where a block was not written
    place.write_bytes(data)
    again = heads(tmp_path)
    again.gather(REF)
    need = again.need(REF.sha256)
    assert need is not None
    for index, chunk in enumerate(CHUNKS):
        if need.bitmap[0] >> index & 1:
            again.add(REF.sha256, index, chunk)
    assert again.read(REF.sha256) == HEAD
    assert need.bitmap[0].bit_count() <= 5 if seed % 2 else need.bitmap[0].bit_count() <= 3


def test_kept_heads_are_few_small_enough_and_not_old(tmp_path: Path) -> None:
    clock = VirtualTime()
    clock.wall_offset = 2e9
    store = kept(tmp_path, clock, max_bytes=1_000_000)
    for number in range(2 * MAX_FILES):
        ref, chunks = make_ref(random.Random(number).randbytes(150_000), 98_304)
        store.put(ref, 0, chunks[0])
        place = tmp_path / f"{ref.sha256.hex()}.blob"
        os.utime(place, (2e9 + number, 2e9 + number))
        assert len(list(tmp_path.iterdir())) <= MAX_FILES
    large, chunks = make_ref(random.Random(99).randbytes(950_000), 98_304)
    store.put(large, 0, chunks[0])
    assert [path.stem for path in tmp_path.iterdir()] == [large.sha256.hex()]
    clock.wall_offset += MAX_AGE_SECONDS + 1e6
    store.put(ref, 0, chunks[0])
    assert [path.stem for path in tmp_path.iterdir()] == [ref.sha256.hex()]
    small, chunks = make_ref(bytes(FROM_BYTES - 1), 98_304)
    store.put(small, 0, chunks[0])
    assert len(list(tmp_path.iterdir())) == 1


def test_disk_that_cannot_be_written_costs_the_memory_of_a_restart_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    one = Heads(MOST, kept=kept(tmp_path / "file" / "heads"))
    one.gather(REF)
    for index, chunk in enumerate(CHUNKS):
        one.add(REF.sha256, index, chunk)
    assert one.read(REF.sha256) == HEAD
    assert caplog.text.count("heads_not_kept") == 1, "said once"


# ---- updates ---------------------------------------------------------------------------------------------------


class LossyReassembly(Reassembly):
    """Of a cloud that is told which chunks a bad network loses."""

    def __init__(self, lost: set[int]) -> None:
        super().__init__(LIMIT)
        self.lost = lost
        self.came: list[int] = []
        self.total = 0

    def add(self, chunk: Chunk | bytes) -> bytes | None:
        parsed = parse(chunk) if isinstance(chunk, bytes) else chunk
        self.came.append(parsed.index)
        self.total = parsed.total
        return None if parsed.index in self.lost else super().add(parsed)


@pytest.mark.parametrize("killed", [False, True], ids=["the connection broke", "the agent was killed"])
def test_update_goes_on_where_it_was(bundle: Bundle, tmp_path: Path, killed: bool) -> None:
    lab = Lab(bundle, tmp_path)
    lab.settle()
    lab.cloud.release(lab.cloud.candidate(), 1)
    lab.broker.max_packet_bytes = 1024 + 256
    cloud = lab.cloud._reassembly = LossyReassembly({1, 2})
    database, slots = open_database(MEMORY, clock=lab.time), MemorySlots(lab.shared)
    agent = lab.agent(database=database, slots=slots)
    lab.run(5)
    feed(agent, bundle)
    config = TrainConfig(epochs=2, batch_size=8, learning_rate=0.05, codec="fp32")
    lab.cloud.invite(lab.cloud.head_of(bundle.checkpoint().params), config=config)
    lab.cloud.broadcast()
    lab.settle()
    lab.cloud.order("dev-1")
    lab.run(3)
    assert cloud.total >= ASKED_FROM_CHUNKS, "several chunks, or this test says nothing"
    assert cloud.came == list(range(cloud.total))
    cloud.came.clear()
    cloud.lost = set()
    if killed:
        lab.agents.clear()
        lab.broker.cut("dev-1", for_seconds=1e9)
        lab.agent(database=database, slots=slots)
    else:
        lab.broker.cut("dev-1", for_seconds=1.0)
    lab.run(3)
    assert cloud.came == [cloud.total - 1], "one chunk, to ask what the cloud has"
    (transfer,) = cloud.transfers()
    heard = lab.cloud.of(Update)
    assert heard == []
    missing = Receipt(
        update_id=bytes(16), transfer=transfer, verdict="missing", missing=cloud.missing(transfer)
    )
    lab.cloud.say(missing, device="dev-1", topic=lab.cloud.topics.by_device("ak", "dev-1"))
    lab.settle()
    assert cloud.came == [cloud.total - 1, 1, 2]
    assert len(lab.cloud.of(Update)) == 1
