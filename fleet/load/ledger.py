"""The books of a load: every update that a light agent made, as the process wrote it down that made it, and what the
aggregator's database has of it at the end.

Laws of the file: an independent ledger, written line by line as things happen and compared with rows, never with
anybody's counters; nothing that a light agent forgets can be missing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec

from cloud_server.db.rounds import UpdateRow

_SOUND = frozenset({"stored", "folded"})


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One thing that happened to an update: it was made (`sha256` of its body), or a receipt ended it (`verdict`).
    Ids and digests are hex."""

    update: str
    device: str = ""
    order: str = ""
    sha256: str = ""
    verdict: str = ""
    reason: str = ""


class LedgerFile:
    """Where one process writes what its agents make and hear."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")

    def made(self, device: str, order: bytes, update: bytes, body_sha256: bytes) -> None:
        """Before anything of it is sent."""
        self._write(Line(update.hex(), device, order.hex(), body_sha256.hex()))

    def ended(self, update: bytes, verdict: str, reason: str) -> None:
        """After a receipt that names the very bytes that were sent."""
        self._write(Line(update.hex(), verdict=verdict, reason=reason))

    def close(self) -> None:
        """Nothing more is written."""
        self._file.close()

    def _write(self, line: Line) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of everything that was made.

    Attributes:
        made, receipts: updates, and those of them that a receipt ended as stored.
        stored: of which the database has one row that counts, with the very content.
        refused: that the aggregator refused or found late, by reason.
        owed: without a row and without a receipt that says stored: the agent still has it.
        lost: without a row, although a receipt said that it is stored.
        doubled: rows that count beyond the one of an order or an update.
        altered: whose row has another content.
        unknown: rows of updates that nobody made.
    """

    made: int
    receipts: int
    stored: int
    refused: dict[str, int] = field(default_factory=dict)
    owed: int = 0
    lost: int = 0
    doubled: int = 0
    altered: int = 0
    unknown: int = 0

    @property
    def is_good(self) -> bool:
        """Whether everything that was made is stored once, and everybody knows."""
        wrong = self.owed + self.lost + self.doubled + self.altered + self.unknown
        return not wrong and not self.refused and self.made == self.stored == self.receipts


def read_lines(paths: Iterable[Path]) -> list[Line]:
    """All that was written."""
    decoder = msgspec.json.Decoder(Line)
    return [decoder.decode(line) for path in paths for line in path.read_bytes().splitlines()]


def compare(lines: Iterable[Line], rows: Sequence[UpdateRow]) -> Verdict:
    """Holds the ledger against the database's rows, of whatever state."""
    made: dict[str, Line] = {}
    said: dict[str, str] = {}
    for line in lines:
        if line.verdict:
            said[line.update] = "stored" if line.verdict == "duplicate" else line.verdict
        else:
            made[line.update] = line
    counting = [row for row in rows if row.state in _SOUND]
    per_order = Counter(row.order_id for row in counting)
    per_update = Counter(row.update_id.hex() for row in counting)
    found = {row.update_id.hex(): row for row in counting}
    refused = Counter(row.reason for row in rows if row.state not in _SOUND and row.update_id.hex() in made)
    without = [update for update in made if update not in found]
    rejected = {row.update_id.hex() for row in rows if row.state not in _SOUND}
    return Verdict(
        made=len(made),
        receipts=sum(said.get(update) == "stored" for update in made),
        stored=sum(
            update in made and row.body_sha256.hex() == made[update].sha256 for update, row in found.items()
        ),
        refused=dict(refused),
        owed=sum(said.get(update) != "stored" and update not in rejected for update in without),
        lost=sum(said.get(update) == "stored" for update in without),
        doubled=sum(count - 1 for counts in (per_order, per_update) for count in counts.values()),
        altered=sum(
            update in made and row.body_sha256.hex() != made[update].sha256 for update, row in found.items()
        ),
        unknown=sum(update not in made for update in found),
    )
