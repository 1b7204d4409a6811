"""The door to the link: whether more than what always passes may go now, what it has cost, and what comes next.

What always passes: the connection itself, births, heartbeats, answers to orders, receipts, and a check of the signed
metadata that keys, certificates or a rollback ask for. What waits while the door is shut: updates, heads and
invitations, releases, reports. Laws of the file: bytes are those that the kernel counted on the sockets
(`wire/traffic.py`), at the door where it does not say (a simulation); a restart forgets nothing; inference never asks
here. Source: docs/how-to/links.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from edge_agent.link.allowance import NOTE_NAME, read_note
from edge_agent.link.budget import DAY_SECONDS, IDLE_SHARE, idle_bytes_a_day, keepalive_for
from edge_agent.link.ledger import Ledger
from edge_agent.link.windows import Calendar, parse_window, parse_zone
from edge_agent.store.storage import Database
from process.clock import Clock
from process.logs import get_logger
from wire.errors import ConfigurationError, StorageError
from wire.traffic import Traffic

if TYPE_CHECKING:
    from edge_agent.settings import EdgeSettings

_log = get_logger("edge_agent.link")

LOOK_SECONDS: Final = 15.0
"""Between two looks at a link with limits."""
KEEP_SECONDS: Final = 60.0
AHEAD_BYTES: Final = 512 * 1024
"""Of updates, handed to the transport and not on the link yet: so much may pass after the door shut."""
SPREAD_FACT: Final = "reconnect_spread"


class Line(Protocol):
    """The connection to the broker, as far as the link is concerned."""

    def traffic(self) -> Traffic | None:
        """What it cost so far; None where nobody counts."""
        ...

    def mute(self, filters: Collection[str]) -> None:
        """Topic filters that are not listened to for now."""
        ...

    def spread(self, seconds: float) -> None:
        """The fleet comes back over so many seconds."""
        ...


class NoLine:
    """Of a simulated device."""

    def traffic(self) -> Traffic | None:
        return None

    def mute(self, filters: Collection[str]) -> None:
        """Everything is heard: what the door keeps out is not acted on."""

    def spread(self, seconds: float) -> None:
        """The simulation brings devices back as it likes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the settings say of a link.

    Attributes:
        per_day, per_month: budgets in bytes; 0 for none.
        idle_bytes_a_day: what an idle agent of these settings costs.
    """

    calendar: Calendar
    per_day: int
    per_month: int
    has_windows: bool
    keepalive_seconds: int
    idle_bytes_a_day: float

    @property
    def is_limited(self) -> bool:
        return self.has_windows or bool(self.per_day or self.per_month)


@dataclass(frozen=True, slots=True)
class View:
    """The door at one moment.

    Attributes:
        reason: why it is shut, or empty.
        until: unix seconds at which that may change; infinity when nothing changes it.
        spent_day, spent_month: bytes of this day and month of the budget.
    """

    is_open: bool = True
    reason: str = ""
    until: float = math.inf
    spent_day: int = 0
    spent_month: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """What a release check may do now.

    Attributes:
        is_open: else it looks at the metadata, and brings nothing but a rollback.
        bytes_left: that a download may cost; None for no limit.
        until: unix seconds at which it must end; 0 for never.
    """

    is_open: bool = True
    bytes_left: int | None = None
    until: float = 0.0


def plan_of(settings: EdgeSettings) -> Plan:
    """The plan that the settings make.

    Raises:
        ConfigurationError: (operator) a window, a zone or a budget that is none.
    """
    link, network, report = settings.link, settings.network, settings.report
    if link.metered != bool(link.bytes_per_day or link.bytes_per_month):
        raise ConfigurationError(
            "link.metered and a budget go together",
            hint="give link.bytes_per_day or link.bytes_per_month, and link.metered = true",
        )
    windows = [parse_window(text) for text in link.windows]
    costs = {
        "heartbeat": report.telemetry_seconds,
        "report": report.inference_seconds,
        "check": settings.release.check_seconds,
    }
    days = [link.bytes_per_day or math.inf, link.bytes_per_month / 31 if link.bytes_per_month else math.inf]
    keepalive = network.keepalive_seconds or keepalive_for(min(days), nat_seconds=link.nat_seconds, **costs)
    return Plan(
        calendar=Calendar(windows, parse_zone(link.timezone), link.month_begins),
        per_day=link.bytes_per_day,
        per_month=link.bytes_per_month,
        has_windows=bool(windows),
        keepalive_seconds=keepalive,
        idle_bytes_a_day=idle_bytes_a_day(keepalive=keepalive, **costs),
    )


class Link:
    """The door of one device. Used from the agent's loop, but for `terms`.

    Args:
        clock: whose days and hours count; give it the floored one.
        folder: the state folder, where a release check notes what it costs; None without one.

    Attributes:
        view: of the newest look.
    """

    def __init__(
        self,
        plan: Plan,
        database: Database,
        clock: Clock,
        line: Line | None = None,
        folder: Path | None = None,
    ) -> None:
        self.plan = plan
        self.view = View()
        self._database = database
        self._clock = clock
        self._line: Line = line or NoLine()
        self._note = folder / NOTE_NAME if folder is not None else None
        self._ledger = Ledger(database)
        self._counted = self._at_the_door = 0
        self._ahead = self._sent = 0
        self._kept_at = clock.monotonic()
        self._bulk: Sequence[str] = ()
        self._is_noting = False

    def begin(self, bulk: Sequence[str]) -> None:
        """The agent starts.

        Args:
            bulk: topic filters that are not listened to while the door is shut.
        """
        self._bulk = bulk
        kept = self._database.fact(SPREAD_FACT)
        if isinstance(kept, float):
            self._line.spread(kept)
        self.look()
        self._line.mute(() if self.view.is_open else self._bulk)

    def spread(self, seconds: float) -> None:
        """The aggregator asks its fleet to come back over so many seconds; known after a restart, too."""
        self._line.spread(seconds)
        if self._database.fact(SPREAD_FACT) != seconds:
            try:
                self._database.set_fact(SPREAD_FACT, seconds, durable=False)
            except StorageError as error:
                _log.warning("spread_not_kept", reason=str(error))

    def look(self) -> View:
        """Counts what came, and decides anew."""
        wall, calendar = self._clock.now(), self.plan.calendar
        (day, day_ends), (month, month_ends) = calendar.day(wall), calendar.month(wall)
        self._ledger.add(day, month, self._news())
        spent_day, spent_month = self._ledger.spent(day, month)
        shut: list[tuple[str, float]] = []
        if not calendar.is_open(wall):
            shut.append(("it is outside of its windows", calendar.next_change(wall)))
        for name, budget, spent, ends in (
            ("day", self.plan.per_day, spent_day, day_ends),
            ("month", self.plan.per_month, spent_month, month_ends),
        ):
            if budget and self._left(budget, spent, ends - wall) <= 0:
                shut.append((f"its budget of the {name} is spent", ends))
        until = max((moment for _, moment in shut), default=calendar.next_change(wall))
        before, self.view = (
            self.view,
            View(not shut, shut[0][0] if shut else "", until, spent_day, spent_month),
        )
        if before.is_open != self.view.is_open:
            self._tell()
        elif self._clock.monotonic() - self._kept_at >= KEEP_SECONDS:
            self.keep()
        return self.view

    def keep(self) -> None:
        """Writes down what was counted."""
        self._kept_at = self._clock.monotonic()
        self._ledger.keep()

    def passed(self, count: int, *, is_upload: bool = False) -> None:
        """So many bytes of topics and payloads went through the door, to the transport or from it."""
        self._at_the_door += count
        if is_upload and self.plan.is_limited:
            self._ahead += count

    def may_upload(self, count: int) -> bool:
        """Whether a packet of an update of so many bytes may go now."""
        if not self.plan.is_limited:
            return True
        self._note_sent()
        if self._ahead and self._ahead + count > AHEAD_BYTES:
            return False  # once more when the broker has acknowledged some of it
        if not self.look().is_open:
            return False
        left = self._bytes_left()
        return left is None or self._ahead + count <= left

    def terms(self) -> Terms:
        """For a release check that begins now; `settle` follows. From any thread."""
        self._is_noting = True
        if not self.plan.is_limited:
            return Terms()
        view = self.view
        return Terms(view.is_open, self._bytes_left(), 0.0 if math.isinf(view.until) else view.until)

    def settle(self) -> None:
        """The check has ended: what it noted counts with the next look. From any thread."""
        self._is_noting = False

    def as_dict(self) -> dict[str, Any]:
        """For the status file."""
        view, plan = self.view, self.plan
        return {
            "is_open": view.is_open,
            "reason": view.reason,
            "until": None if math.isinf(view.until) else view.until,
            "is_limited": plan.is_limited,
            "spent_day_bytes": view.spent_day,
            "spent_month_bytes": view.spent_month,
            "budget_day_bytes": plan.per_day,
            "budget_month_bytes": plan.per_month,
            "idle_day_bytes": round(plan.idle_bytes_a_day),
            "keepalive_seconds": plan.keepalive_seconds,
        }

    # ---- inside ------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        view = self.view
        self._line.mute(() if view.is_open else self._bulk)
        self.keep()
        if view.is_open:
            _log.info("link_opened", spent_day=view.spent_day, spent_month=view.spent_month)
        else:
            _log.info("link_shut", reason=view.reason, until=round(view.until), spent_day=view.spent_day)

    def _news(self) -> int:
        """Bytes since the look before, of broker and release checks."""
        traffic = self._line.traffic()
        total = self._at_the_door if traffic is None else traffic.total_bytes
        news, self._counted = max(0, total - self._counted), total
        # While a check runs, its note is its own: it writes the sum anew.
        return news + (read_note(self._note) if self._note is not None and not self._is_noting else 0)

    def _note_sent(self) -> None:
        traffic = self._line.traffic()
        sent = traffic.sent_bytes if traffic is not None else self._at_the_door
        self._ahead, self._sent = max(0, self._ahead - (sent - self._sent)), sent

    def _bytes_left(self) -> int | None:
        """Of both budgets, less what an idle agent needs until they begin anew; None without any."""
        wall, calendar, view = self._clock.now(), self.plan.calendar, self.view
        lefts = [
            self._left(budget, spent, ends - wall)
            for budget, spent, (_, ends) in (
                (self.plan.per_day, view.spent_day, calendar.day(wall)),
                (self.plan.per_month, view.spent_month, calendar.month(wall)),
            )
            if budget
        ]
        return max(0, min(lefts)) if lefts else None

    def _left(self, budget: int, spent: int, seconds: float) -> int:
        reserved = min(self.plan.idle_bytes_a_day * seconds / DAY_SECONDS, IDLE_SHARE * budget)
        return int(budget - reserved) - spent
