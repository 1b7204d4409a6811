"""What the link has cost, by day and by month of the budget: kept on the disk, so that a restart forgets nothing.

Laws of the file: a number only grows; entries are few and the oldest go; one that cannot be read begins at nothing,
with a line in the log. Written at most once a minute, at a stop, and when the link opens or closes: a crash costs the
count of a minute, never a period.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from edge_agent.store.storage import Database
from process.logs import get_logger
from wire.errors import StorageError

_log = get_logger("edge_agent.link")

FACT: Final = "link_ledger"
KEPT_DAYS: Final = 40
KEPT_MONTHS: Final = 14

_Bytes = Annotated[int, Meta(ge=0, le=2**62)]
_Name = Annotated[str, Meta(max_length=10)]


class _Kept(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    days: Annotated[dict[_Name, _Bytes], Meta(max_length=KEPT_DAYS)] = {}
    months: Annotated[dict[_Name, _Bytes], Meta(max_length=KEPT_MONTHS)] = {}


class Ledger:
    """Bytes by period. Used from the agent's loop only."""

    def __init__(self, database: Database) -> None:
        self._database = database
        kept = _read(database)
        self._days = dict(kept.days)
        self._months = dict(kept.months)
        self._is_news = False

    def add(self, day: str, month: str, count: int) -> None:
        """So many more bytes."""
        if count > 0:
            self._days[day] = self._days.get(day, 0) + count
            self._months[month] = self._months.get(month, 0) + count
            self._is_news = True

    def spent(self, day: str, month: str) -> tuple[int, int]:
        """Of the day, of the month."""
        return self._days.get(day, 0), self._months.get(month, 0)

    def keep(self) -> None:
        """Writes it down, if there is news; a full disk keeps the old numbers, and is tried again."""
        if not self._is_news:
            return
        for periods, most in ((self._days, KEPT_DAYS), (self._months, KEPT_MONTHS)):
            for name in sorted(periods)[:-most]:
                del periods[name]
        try:
            kept = msgspec.json.encode(_Kept(days=self._days, months=self._months))
            self._database.set_fact(FACT, kept, durable=False)
            self._is_news = False
        except StorageError as error:
            _log.warning("link_ledger_not_kept", reason=str(error))


def _read(database: Database) -> _Kept:
    kept = database.fact(FACT)
    if kept is None:
        return _Kept()
    try:
        if isinstance(kept, bytes):
            return msgspec.json.decode(kept, type=_Kept)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        _log.warning("link_ledger_unusable", reason=str(error))
    return _Kept()
