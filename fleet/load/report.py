"""What a load found, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from fleet.load.ledger import Verdict

ROLES = ("aggregator", "broker", "agents", "campaign")


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a run.

    Attributes:
        seconds: of wall time.
        cpu_seconds: of each role; `others`: what else ran on the machine.
    """

    name: str
    seconds: float
    cpu_seconds: dict[str, float]


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        devices, processes, is_tls: what was asked for.
        cores, load_average: of the machine; the average over the minute before.
        busy_share: how much of the machine others used meanwhile.
        enrolments_per_second, connects_per_second: of all devices, one after the other, and in so many processes.
        heartbeats: `sent`, `heard` by the aggregator and `per_second`, while the fleet only was there.
        collection_seconds: from the moment when the round was committed to the last update that was.
        round_seconds: to the new head.
        uploads_again: sends of an update that was on its way already.
        books: the ledger held against the database.
        folded: updates that the new head is made of.
        spread_seconds: from the signature of a release until the aggregator knew of every device that it has it.
        fetched: devices that really fetched and verified both releases' files; the others took them over as announced.
        reconnects: connections that ended before the end.
        peak_mib, peak_queues: memory of each role; the longest queues of the aggregator.
        dropped, pauses: messages that did not fit its queue downward, and how often it stopped reading from the broker.
        refused: messages that could not be used, on either side, by kind.
    """

    devices: int
    processes: int
    is_tls: bool
    cores: int
    load_average: float
    busy_share: float
    enrolments_per_second: float
    connects_per_second: float
    heartbeats: dict[str, float]
    collection_seconds: float
    round_seconds: float
    uploads_again: int
    books: Verdict
    folded: int
    spread_seconds: float
    fetched: int
    reconnects: int
    phases: Sequence[Phase]
    peak_mib: dict[str, float]
    peak_queues: dict[str, int]
    dropped: int
    pauses: int
    refused: dict[str, int]

    @property
    def is_good(self) -> bool:
        """Whether every update is stored and folded once, and everybody has the release."""
        return self.books.is_good and self.books.made == self.devices == self.folded

    def to_json(self) -> str:
        """One object."""
        plain = msgspec.to_builtins(self)
        plain["is_good"] = self.is_good
        return msgspec.json.format(msgspec.json.encode(plain), indent=2).decode() + "\n"


def render(report: LoadReport) -> str:
    """The table."""
    books = report.books
    lines = [
        f"{report.devices:,} devices in {report.processes} processes, {'TLS' if report.is_tls else 'no TLS'},"
        f" {report.cores} cores, load {report.load_average:.1f} before, others used {report.busy_share:.0%}",
        "",
        f"enrolled            {report.enrolments_per_second:10.0f} a second",
        f"connected           {report.connects_per_second:10.0f} a second, {report.reconnects} came again",
        f"heartbeats          {report.heartbeats['per_second']:10.1f} a second,"
        f" {report.heartbeats['sent'] - report.heartbeats['heard']:.0f} of {report.heartbeats['sent']:.0f} lost",
        f"collection          {report.collection_seconds:10.1f} s, {report.uploads_again} updates sent again",
        f"round               {report.round_seconds:10.1f} s to the new head",
        f"receipts            {books.receipts:10d} of {books.made}, {report.folded} folded",
        f"lost                {books.lost:10d}   doubled {books.doubled}, altered {books.altered}, unknown"
        f" {books.unknown}, owed {books.owed}, refused {sum(books.refused.values())}",
        f"release             {report.spread_seconds:10.1f} s to every device; {report.fetched} fetched it",
        "",
        _row("CPU seconds", [*ROLES, "others", "wall"]),
    ]
    for phase in report.phases:
        costs = [f"{phase.cpu_seconds.get(role, 0.0):.1f}" for role in (*ROLES, "others")]
        lines.append(_row(phase.name, [*costs, f"{phase.seconds:.1f}"]))
    lines.append(_row("peak MiB", [f"{report.peak_mib.get(role, 0.0):.0f}" for role in ROLES]))
    stops = {"dropped": report.dropped, "stops of reading": report.pauses}
    for title, counts in (("queues", {**report.peak_queues, **stops}), ("refused", report.refused)):
        lines.append(
            f"{title:<20}" + (", ".join(f"{name} {count}" for name, count in counts.items()) or "none")
        )
    return "\n".join([*lines, "", "good" if report.is_good else "NOT GOOD", ""])


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<20}" + "".join(f"{cell:>12}" for cell in cells)
