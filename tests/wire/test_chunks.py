"""Chunks and blobs: any order, twice, resumed; nothing beyond the budget, nothing with a wrong hash."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.blobs import BlobAssembly, make_ref, needed_chunks
from wire.chunks import HEADER_BYTES, MAX_CHUNK_BYTES, Reassembly, max_payload_bytes, parse, split
from wire.errors import ChunkError
from wire.messages import BlobRef
from wire.primitives import sha256

MESSAGE = random.Random(1).randbytes(2560)


def altered(payload: bytes, **changes: int | bytes) -> bytes:
    """A chunk with another header."""
    names = ("magic", "version", "flags", "index", "total", "size", "transfer")
    layout = struct.Struct(">2sBBIIQ32s")
    fields = dict(zip(names, layout.unpack_from(payload), strict=True)) | changes
    return layout.pack(*fields.values()) + payload[HEADER_BYTES:]


@given(st.binary(min_size=1, max_size=3000), st.integers(256, 700), st.randoms(use_true_random=False))
def test_message_comes_together_from_chunks_in_any_order_and_twice(
    message: bytes, max_payload: int, order: random.Random
) -> None:
    chunks = split(message, max_payload)
    assert all(len(chunk) <= max_payload for chunk in chunks)
    arrivals = chunks[:-1] * 2
    order.shuffle(arrivals)
    reassembly = Reassembly(len(message))
    if len(chunks) > 1:
        last = arrivals[-1]
        done = [reassembly.add(chunk) for chunk in arrivals if chunk != last]
        assert not any(done)
        lacking = {parse(last).index, len(chunks) - 1}
        assert set(reassembly.missing(sha256(message))) == lacking
        assert reassembly.add(last) is None
    assert reassembly.add(chunks[-1]) == message
    assert reassembly.transfers() == ()


@pytest.mark.parametrize("size", [1, 203, 204, 205, 408, 409, MAX_CHUNK_BYTES, 3 * MAX_CHUNK_BYTES])
def test_sizes_around_a_chunk_come_together(size: int) -> None:
    message = bytes(size)
    for max_payload in (256, MAX_CHUNK_BYTES):
        reassembly = Reassembly(size)
        results = [reassembly.add(chunk) for chunk in reversed(split(message, max_payload))]
        assert results[-1] == message


@given(st.binary(max_size=200))
def test_any_bytes_give_a_chunk_or_our_error(data: bytes) -> None:
    for payload in (data, split(MESSAGE, 256)[1][:HEADER_BYTES] + data, b"SC\1\0" + data):
        try:
            chunk = parse(payload)
        except ChunkError:
            continue
        assert chunk.index < chunk.total <= chunk.size_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"magic": b"XX"},
        {"version": 2},
        {"flags": 1},
        {"index": 13},
        {"total": 0},
        {"total": 12},
        {"total": 14},
        {"total": 5000},
        {"size": 0},
        {"size": 2**63},
        {"size": 13 * 204 + 1},
        {"size": 12 * 204},
    ],
)
def test_chunk_with_impossible_numbers_is_refused(changes: dict[str, int | bytes]) -> None:
    chunks = split(MESSAGE, 256)
    assert len(chunks) == 13
    with pytest.raises(ChunkError):
        parse(altered(chunks[3], **changes))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 300))
def test_any_numbers_give_a_chunk_that_can_be_or_our_error(
    index: int, total: int, size: int, length: int
) -> None:
    payload = struct.pack(">2sBBIIQ32s", b"SC", 1, 0, index, total, size, bytes(32)) + bytes(length)
    try:
        chunk = parse(payload)
    except ChunkError:
        return
    before = chunk.index * chunk.piece_bytes
    assert len(chunk.piece) == min(chunk.piece_bytes, size - before)
    assert (total - 1) * chunk.piece_bytes < size <= total * chunk.piece_bytes


def test_damaged_piece_is_found_at_the_end_and_the_transfer_can_start_over() -> None:
    chunks = split(MESSAGE, 256)
    reassembly = Reassembly(len(MESSAGE))
    reassembly.add(chunks[0][:-1] + b"?")
    for chunk in chunks[1:-1]:
        reassembly.add(chunk)
    with pytest.raises(ChunkError, match="hash"):
        reassembly.add(chunks[-1])
    assert [reassembly.add(chunk) for chunk in chunks][-1] == MESSAGE


def test_piece_that_is_there_is_not_replaced() -> None:
    chunks = split(MESSAGE, 256)
    reassembly = Reassembly(len(MESSAGE))
    reassembly.add(chunks[0])
    reassembly.add(chunks[0][:-1] + b"?")
    assert [reassembly.add(chunk) for chunk in chunks[1:]][-1] == MESSAGE


def test_transfer_beyond_the_grant_is_refused_and_others_stay() -> None:
    small, large = split(MESSAGE, 256), split(bytes(len(MESSAGE) + 1), 256)
    reassembly = Reassembly(len(MESSAGE))
    reassembly.add(small[0])
    with pytest.raises(ChunkError) as caught:
        reassembly.add(large[0])
    assert caught.value.facts == {"size_bytes": len(MESSAGE) + 1, "limit_bytes": len(MESSAGE)}
    assert reassembly.transfers() == (sha256(MESSAGE),)


def test_open_transfers_stay_inside_count_and_budget_and_the_oldest_goes() -> None:
    first, second, third = (bytes([n]) * 1000 for n in range(3))
    by_count = Reassembly(10_000, max_transfers=2)
    for message in (first, second, first, third):
        by_count.add(split(message, 256)[0])
    assert by_count.transfers() == (sha256(first), sha256(third))
    by_bytes = Reassembly(2500, max_transfers=9)
    for message in (first, second, third):
        by_bytes.add(split(message, 256)[0])
        assert by_bytes.granted_bytes <= 2500
    assert by_bytes.transfers() == (sha256(second), sha256(third))


def test_transfer_cut_for_another_broker_starts_over() -> None:
    reassembly = Reassembly(len(MESSAGE))
    for chunk in split(MESSAGE, 300)[:-1]:
        reassembly.add(chunk)
    again = split(MESSAGE, 256)
    assert reassembly.add(again[0]) is None
    assert reassembly.missing(sha256(MESSAGE)) == tuple(range(1, len(again)))
    assert [reassembly.add(chunk) for chunk in again][-1] == MESSAGE


def test_dropped_transfer_is_forgotten() -> None:
    reassembly = Reassembly(len(MESSAGE))
    reassembly.add(split(MESSAGE, 256)[0])
    reassembly.drop(sha256(MESSAGE))
    assert reassembly.missing(sha256(MESSAGE)) == ()
    assert reassembly.granted_bytes == 0


def test_claimed_size_allocates_nothing() -> None:
    piece = bytes(MAX_CHUNK_BYTES - HEADER_BYTES)
    total = 2000
    header = struct.pack(">2sBBIIQ32s", b"SC", 1, 0, 0, total, total * len(piece), bytes(32))
    reassembly = Reassembly(total * len(piece))
    tracemalloc.start()
    try:
        reassembly.add(header + piece)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(piece)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("max_payload", [0, 255, MAX_CHUNK_BYTES + 1])
def test_chunk_size_out_of_bounds_is_refused(max_payload: int) -> None:
    with pytest.raises(ChunkError):
        split(MESSAGE, max_payload)


@pytest.mark.parametrize(("message", "max_payload"), [(b"", 256), (bytes(204 * 4096 + 1), 256)])
def test_message_that_cannot_be_cut_is_refused(message: bytes, max_payload: int) -> None:
    with pytest.raises(ChunkError):
        split(message, max_payload)


def test_payload_fits_what_the_broker_accepts() -> None:
    assert max_payload_bytes(2**28) == MAX_CHUNK_BYTES
    assert max_payload_bytes(20_480) == 20_480 - 1024
    with pytest.raises(ChunkError):
        max_payload_bytes(1000)


# --- blobs ---


@given(st.binary(max_size=9000), st.integers(1024, 3000), st.randoms(use_true_random=False))
def test_blob_comes_together_in_any_order(data: bytes, chunk_bytes: int, order: random.Random) -> None:
    ref, chunks = make_ref(data, chunk_bytes)
    assembly = BlobAssembly(ref)
    indices = list(range(len(chunks)))
    order.shuffle(indices)
    for done, index in enumerate(indices):
        needed = needed_chunks(assembly.need_bitmap(), len(chunks))
        assert needed == assembly.missing() == tuple(sorted(indices[done:]))
        assert assembly.add(index, chunks[index])
        assert not assembly.add(index, chunks[index])
    assert assembly.is_complete
    assert assembly.result() == data


def test_blob_takes_no_chunk_but_its_own() -> None:
    ref, chunks = make_ref(MESSAGE, 1024)
    assembly = BlobAssembly(ref)
    for index, chunk in ((0, chunks[1]), (0, chunks[0][:-1]), (3, chunks[0]), (-1, chunks[0])):
        with pytest.raises(ChunkError):
            assembly.add(index, chunk)
    with pytest.raises(ChunkError, match="not complete"):
        assembly.result()
    assert assembly.missing() == (0, 1, 2)


@pytest.mark.parametrize(
    ("size_bytes", "hashes", "limit_bytes"),
    [(2560, 2, 10_000), (2560, 4, 10_000), (2560, 3, 2559), (0, 1, 10_000)],
)
def test_reference_with_numbers_that_do_not_fit_is_refused(
    size_bytes: int, hashes: int, limit_bytes: int
) -> None:
    ref = BlobRef(
        sha256=bytes(32), size_bytes=size_bytes, chunk_bytes=1024, chunk_sha256=(bytes(32),) * hashes
    )
    with pytest.raises(ChunkError):
        BlobAssembly(ref, limit_bytes=limit_bytes)


def test_reference_whose_chunks_make_another_blob_is_found_out() -> None:
    ref, chunks = make_ref(MESSAGE, 1024)
    lying = BlobRef(
        sha256=bytes(32),
        size_bytes=ref.size_bytes,
        chunk_bytes=ref.chunk_bytes,
        chunk_sha256=ref.chunk_sha256,
    )
    assembly = BlobAssembly(lying)
    for index, chunk in enumerate(chunks):
        assembly.add(index, chunk)
    with pytest.raises(ChunkError, match="hash"):
        assembly.result()


@given(st.binary(max_size=6), st.integers(0, 50))
def test_any_bitmap_gives_chunks_that_exist_or_our_error(bitmap: bytes, total: int) -> None:
    try:
        needed = needed_chunks(bitmap, total)
    except ChunkError:
        return
    assert all(0 <= index < total for index in needed)


@pytest.mark.parametrize("chunk_bytes", [1023, 122_881])
def test_blob_chunk_size_out_of_bounds_is_refused(chunk_bytes: int) -> None:
    with pytest.raises(ChunkError):
        make_ref(MESSAGE, chunk_bytes)
