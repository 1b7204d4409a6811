"""What flipped bits in SQLite's write-ahead log cost: nothing, where it was one; else a row that is found damaged.

SQLite takes a frame whose checksum is wrong for the end of the log: what was committed behind it, and synced, would be
gone without a word. Here the log is looked through before SQLite sees it. One wrong bit of a frame is put right, since
the checksum is a sum: the difference names word and bit. Where that does not fit, but frames behind it hang together,
the frame stays as it is (or gives way to its neighbour, where it cannot be one) and all pages are written to their
places in the database, which must then be salvaged row by row.

Laws of the file: what a power cut left half written at the end of the log, and was never acknowledged, is not brought
back: nothing that hangs together lies behind it; the log is replaced whole or not at all. Source: SQLite's file format,
§4.1 and §4.2 (sqlite.org/fileformat2.html).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from edge_agent.store.disk import write_durably
from edge_agent.store.schema import PAGE_BYTES
from wire.errors import StorageError

Outcome = Literal["whole", "mended", "damaged", "foreign"]
Sums = tuple[int, int]
Words = NDArray[np.uint32]

LOG_SUFFIX: Final = "-wal"
_HEAD: Final = struct.Struct(">IIIIIIII")
_FRAME: Final = struct.Struct(">IIIIII")
_FRAME_BYTES: Final = _FRAME.size + PAGE_BYTES
_SUMMED_BYTES: Final = 8
_LITTLE, _BIG = 0x377F0682, 0x377F0683
_VERSION: Final = 3007000
_MASK: Final = 0xFFFFFFFF
_MAX_LOG_BYTES: Final = 512 * 1024 * 1024
_MOST_CHOICES: Final = 2


@dataclass(slots=True)
class _Frame:
    """One frame as it lies there."""

    page: int
    pages: int
    salts: Sums
    sums: Sums
    data: bytes

    @classmethod
    def read(cls, raw: bytes) -> _Frame:
        page, pages, salt_1, salt_2, sum_1, sum_2 = _FRAME.unpack_from(raw)
        return cls(page, pages, (salt_1, salt_2), (sum_1, sum_2), raw[_FRAME.size :])

    def summed(self) -> bytes:
        """What the checksum is over."""
        return struct.pack(">II", self.page, self.pages) + self.data


def mend_log(path: Path) -> Outcome:
    """Looks through a write-ahead log that a crash left, and puts it right where it can.

    Args:
        path: the log (`…-wal`); nothing happens when there is none.

    Returns:
        `whole`: as SQLite would read it anyway; `mended`: no commit is missing from it now; `damaged`: its pages stand
        in the database now, some of them wrong, and there is no log; `foreign`: nothing of it is a log of ours.

    Raises:
        StorageError: it could not be replaced.
        OSError: it cannot be read.
    """
    try:
        if not 0 < path.stat().st_size <= _MAX_LOG_BYTES:
            return "whole"
        raw = path.read_bytes()
    except FileNotFoundError:
        return "whole"
    frames = [
        _Frame.read(raw[at : at + _FRAME_BYTES])
        for at in range(_HEAD.size, len(raw) - _FRAME_BYTES + 1, _FRAME_BYTES)
    ]
    if not frames:
        return "whole"
    log = _Log(raw[: _HEAD.size], frames)
    outcome = log.mend()
    database = path.with_name(path.name.removesuffix(LOG_SUFFIX))
    if log.pages() and (not database.exists() or not database.stat().st_size):
        outcome = "damaged"  # SQLite would delete the log of an empty database
    if outcome == "mended":
        write_durably(path, log.to_bytes())
    elif outcome == "damaged":
        _pour(log.pages(), database)
        path.unlink()
    return outcome


class _Log:
    """A header and its frames."""

    def __init__(self, head: bytes, frames: list[_Frame]) -> None:
        fields = _HEAD.unpack(head)
        self._frames = frames
        self._order = ">u4" if fields[0] == _BIG else "<u4"
        computed = _head_sums(head[:24], self._order)
        self._is_head_whole = (
            computed == fields[6:] and fields[0] in (_LITTLE, _BIG) and fields[1:3] == (_VERSION, PAGE_BYTES)
        )
        self._sequence = fields[3]
        self._salts: Sums = (fields[4], fields[5]) if self._is_head_whole else frames[0].salts
        # Where a bit of the header is wrong, either its sum is right or what the sum is over.
        self._starts = [(fields[6], fields[7]), computed]
        self._length = self._find_end()

    def mend(self) -> Outcome:
        if self._length == 0:
            return "whole" if self._is_head_whole else "foreign"
        outcome: Outcome = "whole" if self._is_head_whole else "mended"
        sums = self._start()
        for index in range(self._length):
            frame = self._frames[index]
            sums_now = _sums(frame.summed(), sums, self._order)
            if sums_now != frame.sums or frame.salts != self._salts:
                found = self._correct(index, sums_now)
                if found == "torn" and not self._is_followed(index):
                    # The end of what was synced: SQLite ends here, too.
                    self._length = index
                    break
                if found == "torn":
                    self._keep_what_is_left(index)
                outcome = "mended" if found == "right" and outcome != "damaged" else "damaged"
            sums = frame.sums
        return outcome

    def to_bytes(self) -> bytes:
        """The log with sums that fit."""
        magic = _BIG if self._order == ">u4" else _LITTLE
        head = struct.pack(">IIIIII", magic, _VERSION, PAGE_BYTES, self._sequence, *self._salts)
        sums = _head_sums(head, self._order)
        parts = [head, struct.pack(">II", *sums)]
        for frame in self._frames[: self._length]:
            sums = _sums(frame.summed(), sums, self._order)
            parts += [_FRAME.pack(frame.page, frame.pages, *self._salts, *sums), frame.data]
        return b"".join(parts)

    def pages(self) -> list[tuple[int, bytes]]:
        """What was committed, in its order: numbers of pages, from 1, and their bytes."""
        commits = [index for index in range(self._length) if self._frames[index].pages]
        return [(each.page, each.data) for each in self._frames[: max(commits, default=-1) + 1]]

    def _find_end(self) -> int:
        """How many frames there may be: up to the last that hangs on the one before, and one that may be damaged."""
        count = len(self._frames)
        for index in range(count - 1, -1, -1):
            if self._is_ours(index) and (self._hangs(index) if index else self._begins()):
                return index + 2 if index + 1 < count and self._is_ours(index + 1) else index + 1
        return 0

    def _is_ours(self, index: int) -> bool:
        """Whether a frame has the salts of this log, but for one bit."""
        return _distance(self._frames[index].salts, self._salts) <= 1

    def _start(self) -> Sums:
        first = self._frames[0]
        for start in self._starts:
            if _sums(first.summed(), start, self._order) == first.sums:
                return start
        return self._starts[0]

    def _begins(self) -> bool:
        """Whether the first frame is one of this log's."""
        first = self._frames[0]
        return self._is_head_whole or _sums(first.summed(), self._start(), self._order) == first.sums

    def _hangs(self, index: int) -> bool:
        """Whether a frame continues what the one before it says of itself."""
        before, frame = self._frames[index - 1], self._frames[index]
        return _sums(frame.summed(), before.sums, self._order) == frame.sums

    def _is_followed(self, index: int) -> bool:
        """Whether a commit lies behind the transaction of a frame, in frames that hang together: a transaction begins
        when the one before it is on the disk. Of the last one any frame may be torn, and the commit behind it there."""
        own = next(
            (at for at in range(index, self._length) if self._frames[at].pages and self._is_ours(at)), index
        )
        return any(
            self._frames[at].pages and self._is_ours(at) and self._hangs(at)
            for at in range(own + 1, self._length)
        )

    def _correct(self, index: int, computed: Sums) -> Literal["right", "one_bit", "torn"]:
        """Puts one wrong bit right. `one_bit`: it was one, and nobody can tell which."""
        frame = self._frames[index]
        if computed == frame.sums:
            # Only its salts are wrong.
            is_one = _distance(frame.salts, self._salts) == 1
            frame.salts = self._salts
            return "right" if is_one else "torn"
        if frame.salts != self._salts:
            return "torn"
        is_sum = _distance(computed, frame.sums) == 1
        is_followed = index + 1 < self._length and self._hangs(index + 1)
        if is_sum and index + 1 < self._length and not is_followed:
            frame.sums = computed
            return "right"
        found = _with_bit_right(frame.summed(), computed, frame.sums, self._order)
        if len(found) == 1 and not is_sum:
            frame.page, frame.pages = struct.unpack_from(">II", found[0])
            frame.data = found[0][_SUMMED_BYTES:]
            return "right"
        return "one_bit" if found or is_sum else "torn"

    def _keep_what_is_left(self, index: int) -> None:
        frame, following = self._frames[index], self._frames[index + 1]
        most = max(each.pages for each in self._frames[: self._length])
        if frame.salts == self._salts and 0 < frame.page <= most and frame.pages in (0, most):
            return
        # Not the header of a frame: what comes next is written twice, which changes nothing.
        frame.page, frame.pages, frame.data = following.page, 0, following.data


def _pour(pages: list[tuple[int, bytes]], database: Path) -> None:
    """Writes pages to their places, as a checkpoint does; once more if a crash comes between."""
    descriptor = os.open(database, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        for number, data in pages:
            os.pwrite(descriptor, data, (number - 1) * PAGE_BYTES)
        os.fsync(descriptor)
    except OSError as error:
        raise StorageError(f"cannot write {database}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _distance(one: Sums, other: Sums) -> int:
    """How many bits differ."""
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))


def _head_sums(head: bytes, order: str) -> Sums:
    first, second = 0, 0
    words = [int(word) for word in np.frombuffer(head, order)]
    for a, b in zip(words[::2], words[1::2], strict=True):
        first = (first + a + second) & _MASK
        second = (second + b + first) & _MASK
    return first, second


@cache
def _weights() -> tuple[Words, Words, tuple[int, int, int]]:
    """What each word of a frame counts in both sums, and what the sums before it do.

    A pair (a, b) of words takes (s, t) to (s + t + a, s + 2t + a + b).
    """
    pairs = (_SUMMED_BYTES + PAGE_BYTES) // 8
    first, second = np.zeros(2 * pairs, np.uint32), np.zeros(2 * pairs, np.uint32)
    p, q, r = 1, 0, 1
    for pair in range(pairs - 1, -1, -1):
        first[2 * pair], first[2 * pair + 1] = (p + q) & _MASK, q
        second[2 * pair], second[2 * pair + 1] = (q + r) & _MASK, r
        p, q, r = (p + q) & _MASK, (q + r) & _MASK, (q + 2 * r) & _MASK
    return first, second, (p, q, r)


def _sums(summed: bytes, before: Sums, order: str) -> Sums:
    first, second, (p, q, r) = _weights()
    words = np.frombuffer(summed, order).astype(np.uint32)
    s, t = before
    return (
        (p * s + q * t + int((first * words).sum(dtype=np.uint64))) & _MASK,
        (q * s + r * t + int((second * words).sum(dtype=np.uint64))) & _MASK,
    )


def _with_bit_right(summed: bytes, computed: Sums, wanted: Sums, order: str) -> list[bytes]:
    """The bytes with one bit put right so that their sums are the wanted ones; the highest bits leave a choice."""
    first, second, _ = _weights()
    words = np.frombuffer(summed, order).astype(np.uint32)
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    is_set = (words[:, None] & bits) != 0
    change = np.where(is_set, np.uint32(0) - bits, bits)
    missing = [np.uint32((want - have) & _MASK) for want, have in zip(wanted, computed, strict=True)]
    fits = (first[:, None] * change == missing[0]) & (second[:, None] * change == missing[1])
    found = []
    for word, bit in np.argwhere(fits)[:_MOST_CHOICES]:
        right = words.copy()
        right[word] ^= bits[bit]
        found.append(right.astype(order).tobytes())
    return found
